"""Smaller models: layers kept in fewer bits or fewer numbers."""
