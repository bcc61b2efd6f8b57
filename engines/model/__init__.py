"""A small and exact Llama-family decoder."""
