"""One recursion over tiers and rules: what a round is, how it runs, and what it leaves on the device."""
