"""Parts of the tasks that learn from preferences: columns, tokens, log-probabilities, figures."""
