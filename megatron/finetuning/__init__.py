"""Supervised fine-tuning: conversations to tokens of which the answers count, packed without padding between them."""
