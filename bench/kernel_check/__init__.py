"""Every kernel on this machine's GPU: right, the same for every window, free of races, and how fast."""
