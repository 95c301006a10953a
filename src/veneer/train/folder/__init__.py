"""Lays out a run's folder: settings, metrics, checkpoints, result."""
