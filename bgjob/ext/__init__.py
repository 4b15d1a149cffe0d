"""Optional integrations; each module says which extra it needs."""
