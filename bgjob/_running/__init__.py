"""How one job is run and settled."""
