"""What a model makes of a long context: its loss by how much it sees, and whether it finds a needle."""
