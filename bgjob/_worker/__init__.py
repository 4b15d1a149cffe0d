"""Which threads do it."""
