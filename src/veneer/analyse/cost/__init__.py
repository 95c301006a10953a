"""Predicts and measures FLOPs and memory."""
