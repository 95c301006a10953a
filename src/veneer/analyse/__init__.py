"""Analyses adapters: spectra of changes, costs, figures and report pages."""
