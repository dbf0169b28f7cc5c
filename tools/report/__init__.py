"""The report of a run: what its folder holds, the cards that show it, and the page they are shown on."""
