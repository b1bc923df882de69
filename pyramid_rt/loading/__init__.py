"""From files to tiers: weights directories, safetensors, memory planned before it is taken, defaults."""
