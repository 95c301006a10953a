"""Loads an adapter into a server that runs, and proves that it acts there."""
