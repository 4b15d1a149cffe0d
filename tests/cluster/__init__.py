"""A PostgreSQL cluster under Patroni, and what bgjob does while its primary changes."""
