"""Parameter groups and optimisers that work by roles on any method."""
