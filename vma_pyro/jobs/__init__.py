"""What the experiments have in common: running, resuming, scoring and writing results."""
