"""Starts of adapters that depend on the data or on the base."""
