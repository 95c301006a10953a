"""Figures of classes, numbers, texts and programs."""
