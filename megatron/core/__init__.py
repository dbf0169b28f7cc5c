"""Ranks, groups, the layout of a sequence over them, and the collectives between them."""
