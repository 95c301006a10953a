"""Verbs that search over settings: `veneer compare`, `veneer rank`, `veneer study`."""
