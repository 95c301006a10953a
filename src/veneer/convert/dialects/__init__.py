"""One file per adapter format of another program."""
