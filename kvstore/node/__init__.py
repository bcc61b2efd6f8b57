"""The storage daemon of one host: pure state, two doors, a thin shell."""
