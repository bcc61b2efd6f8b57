"""What transfers cost, against the memory, the wire and other systems, in one run."""
