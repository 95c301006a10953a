"""Loads base models and adapters, and describes the machine they run on."""
