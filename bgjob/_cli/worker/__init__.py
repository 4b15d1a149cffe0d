"""How the command runs a worker."""
