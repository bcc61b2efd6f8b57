"""Where a request runs: a policy a file, all pure."""
