"""Does for every method alike: attach, switch, merge, combine, save and load."""
