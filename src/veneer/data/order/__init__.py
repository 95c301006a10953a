"""Orders the examples of an epoch, in memory or as a stream."""
