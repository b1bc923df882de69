"""The ops of a forward pass behind one object: `base` says what they are, `torch` and `triton` compute them."""
