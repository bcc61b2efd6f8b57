"""Which block goes first when a pool is full: a policy a file."""
