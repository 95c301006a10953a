"""Settings of a training in parts, which `train/run.py` joins."""
