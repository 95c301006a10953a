"""Searches over settings: comparisons of methods, ranks, and studies of learning and forgetting."""
