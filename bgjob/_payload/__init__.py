"""How a payload is read."""
