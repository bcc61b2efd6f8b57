"""Which blocks are on which nodes, as far as one who watches them knows."""
