"""Start any role, or a whole cluster on one host."""
