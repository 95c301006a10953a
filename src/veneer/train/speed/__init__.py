"""Makes training faster: compilation, attention kernels, frozen blocks."""
