"""One training run: build the parts, check them, prepare the teacher, train, evaluate."""
