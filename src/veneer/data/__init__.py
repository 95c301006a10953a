"""Text in: files, columns, tokens, masks, packing."""
