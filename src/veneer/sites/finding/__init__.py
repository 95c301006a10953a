"""Finds layers by name and kind, and leaves out those that cannot be adapted."""
