"""The ranks as processes: how they meet, agree on settings, watch one another and end."""
