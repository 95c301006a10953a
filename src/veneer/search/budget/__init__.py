"""`veneer fit --forget-at-most`: the most learning within a bound on forgetting."""
