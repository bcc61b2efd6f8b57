"""Which bytes are free: the allocator and the memory under it."""
