"""Optional integrations: each module needs the extra of its own name."""
