"""What is watched while a model trains: finite values, speed, memory, losses by position."""
