"""Matrices of bare parameters: which there are, how they are kept, and the site of one."""
