"""How the demo pyramid is trained, measured and described."""
