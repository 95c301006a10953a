"""Serves a different adapter to every row of a batch."""
