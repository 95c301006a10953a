"""Attention kernels with a backward of their own."""
