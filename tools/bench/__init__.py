"""Benchmarks: a question a file, one report format."""
