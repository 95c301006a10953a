"""Text for language models: rows as windows of tokens, the output head, figures, samples."""
