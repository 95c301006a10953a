"""Trains three methods on the built-in model and shows learning beside forgetting."""
