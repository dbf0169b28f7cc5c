"""Rules between settings, by concern: small functions that return an error message, or None."""
