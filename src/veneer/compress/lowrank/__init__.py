"""Low-rank compression of a stack of blocks: measure, allocate ranks, decompose, refine."""
