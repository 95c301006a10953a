"""Everything that is the same for all methods: attaching, merging, saving."""
