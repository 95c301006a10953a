"""BitFit (Ben Zaken et al. 2021, section 3): every bias is trained, of linear layers and of norms, and
nothing else."""


def weights(t, d):
    """The model's parameters with d, by the name of its module, added to every bias."""
    return {name: w + d[name.removesuffix(".bias")] if name.endswith(".bias") else w for name, w in t.items()}
