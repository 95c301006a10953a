"""`veneer compress`."""
