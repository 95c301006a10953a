"""Closed forms from the papers, in float64, sharing no code with veneer.

Each takes W (out, in), the change's tensors by name and the options it was attached with, and returns W'.
"""
