"""Pictures and sound as tensors, and parts of the tasks that learn from them."""
