"""Moves bytes between registered memories; knows no blocks, no models and no gRPC."""
