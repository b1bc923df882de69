"""The demo pyramid's training, measurement and description."""
