"""One training run: building, rehearsing, teaching, fitting, scoring."""
