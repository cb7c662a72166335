"""Drawing road scenes: a canvas in metres and what stands on it."""
