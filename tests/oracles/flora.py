"""FLoRA (Wen & Chaudhuri 2023, the layer of one example): the pretrained weight times a low-rank matrix,
number by number."""


def weight(W, t, options):
    changed = W.copy()
    for o in range(W.shape[0]):
        for i in range(W.shape[1]):
            changed[o, i] *= sum(t["B"][o, k] * t["A"][k, i] for k in range(len(t["A"])))
    return changed
