"""Kinds of text-to-image pipelines, one file each."""
