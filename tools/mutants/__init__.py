"""Plants small faults in methods, optimisers and the store, to test the tests: make mutants."""
