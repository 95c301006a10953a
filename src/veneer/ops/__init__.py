"""Functions of tensors; they know no modules."""
