"""Trainings in workers of Ray Train, for `--engine ray`."""
