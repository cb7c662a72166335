"""Storage of weights: formats, sources, loading, saving, export and licence lineage."""
