"""Base and adapters in one pass over x, as one Triton kernel; never imported where Triton is missing."""
