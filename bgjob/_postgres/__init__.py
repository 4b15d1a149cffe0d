"""How a statement is sent."""
