"""The search for faster launch configurations on this machine's GPU."""
