"""Compresses models: layers in fewer bits or with fewer numbers."""
