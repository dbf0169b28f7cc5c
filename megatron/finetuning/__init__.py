"""Supervised fine-tuning: conversations packed without padding between them, with the loss on the answers only."""
