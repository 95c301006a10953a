"""Turns the columns of rows into examples of three kinds: text, pair and messages."""
