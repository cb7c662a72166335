"""Subcommands of scripts/benchmark.py, one file each; measure.py has shared code."""
