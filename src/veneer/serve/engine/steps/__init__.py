"""Steps of a model: packed rows or padded batches, and the cache of keys and values."""
