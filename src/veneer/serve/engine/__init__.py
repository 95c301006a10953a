"""The engine: many requests in one batch, each with its own adapters."""
