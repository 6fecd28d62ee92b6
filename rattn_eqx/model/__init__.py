"""The layers, and the language model that they make: shapes and mathematics, no training."""
