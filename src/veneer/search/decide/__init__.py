"""Decisions of a search on figures alone: rates, rungs, ties. Nothing here trains."""
