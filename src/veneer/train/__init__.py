"""The training run: settings, loop, checkpoints, evaluation."""
