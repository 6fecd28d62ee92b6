"""Recall tasks, whose answers lie a known distance back."""
