"""Saves adapters and loads them back: tensors, manifest, fingerprint of the base."""
