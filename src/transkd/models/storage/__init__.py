"""Weights on disk and on hubs: what a file holds, what is said beside it, and how it gets into a network and out."""
