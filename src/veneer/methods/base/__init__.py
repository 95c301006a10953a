"""Defines the parts that every method shares: the delta, its options, its checks."""
