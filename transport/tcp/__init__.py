"""`tcp`: between hosts; the owner checks and sends, the reader lets land."""
