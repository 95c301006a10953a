"""Trained rank pruning: a network trained into low rank, and factored at the end."""
