"""Attention kernels with their own backward."""
