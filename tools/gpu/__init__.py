"""Checks and times Veneer on one GPU, within eight minutes: make gpu."""
