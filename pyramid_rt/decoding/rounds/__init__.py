"""One outer round: the recursion over tiers, and its steps in torch or as a list of kernel launches."""
