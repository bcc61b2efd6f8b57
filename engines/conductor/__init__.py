"""The global scheduler and its HTTP front."""
