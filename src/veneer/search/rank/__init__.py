"""`veneer rank`: the rank that a task needs, from one pilot or from trainings at rising ranks."""
