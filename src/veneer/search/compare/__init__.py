"""`veneer compare`: methods at their own best learning rates, over seeds, with intervals."""
