"""Models as pure functions of (weights, tokens, positions, cache): no decoding logic lives here."""
