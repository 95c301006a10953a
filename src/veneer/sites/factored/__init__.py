"""Linear layers of low rank, whose W is kept as a product, and their place among the sites."""
