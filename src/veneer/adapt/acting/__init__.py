"""Applies deltas at one layer, and finds out how a layer is called."""
