"""Reads training text: files to rows, rows to tokens with masks, tokens to packed windows."""
