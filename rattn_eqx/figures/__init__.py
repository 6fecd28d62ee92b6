"""Pictures: curves of runs and results, the pairs that one head reads, and controls for it in a notebook."""
