"""Puts adapters into other programs' training loops: transformers' Trainer and TRL's trainers."""
