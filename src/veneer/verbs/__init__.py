"""One verb of the command line, one file or folder."""
