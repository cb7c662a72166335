"""What scripts/benchmark.py measures: one file a subcommand, and what they share in measure.py."""
