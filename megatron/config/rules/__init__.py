"""Rules between settings, by concern: small functions that return what is wrong, or None."""
