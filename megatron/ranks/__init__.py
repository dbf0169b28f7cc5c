"""The ranks as processes: rendezvous, agreement on settings, watchdog and exit."""
