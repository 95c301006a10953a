"""Reads and writes PEFT's adapter files."""
