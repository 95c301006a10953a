"""Interface of a task, and the figures that it measures."""
