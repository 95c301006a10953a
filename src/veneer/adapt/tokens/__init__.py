"""Adds tokens to a model and its tokenizer."""
