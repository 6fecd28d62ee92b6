"""Which part matters: layers with parts exchanged, grids of small models, differences with intervals."""
