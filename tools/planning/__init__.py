"""What tools/plan_context.py reads and prints."""
