"""(IA)3 (Liu et al. 2022, section 3.3) on the feed-forward block: h is multiplied before W reads it."""


def weight(W, t, options):
    return W * t["l"]
