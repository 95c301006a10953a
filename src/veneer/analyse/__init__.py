"""What was learned: spectra of changes, comparisons, pictures. Numbers first; pictures read only numbers."""
