"""Command lines, the local cluster and the benchmarks."""
