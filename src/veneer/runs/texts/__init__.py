"""Turns the texts of a run into windows of tokens."""
