"""Plants small faults in methods, optimisers and the store, and sees whether the tests notice: make mutants."""
