"""Decompositions and projections of matrices."""
