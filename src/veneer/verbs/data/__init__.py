"""Shows and checks training data."""
