"""Defines the parts that every optimiser shares: groups, moments, pairs of factors."""
