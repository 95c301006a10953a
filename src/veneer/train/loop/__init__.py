"""Trains step by step: schedule, evaluation, state, signals."""
