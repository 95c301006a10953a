"""Draws the report page of a run: numbers in, HTML out."""
