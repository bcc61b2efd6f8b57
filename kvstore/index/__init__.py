"""Where a block lies: block key to extent."""
