"""Runs every fault that tests/faults can inject, and counts the right endings."""
