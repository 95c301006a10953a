"""One objective, one file: causal language modelling so far."""
