"""MobileNetV2: torchvision's state dict as transformers' MobileNetV2ForImageClassification."""

from __future__ import annotations

from pathlib import Path

from real.preprocessor import pictures


def convert(unpacked: Path, out: Path) -> None:
    """Writes the model and its preprocessing. Raises ValueError if the two tensor lists differ in shape."""
    import torch
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    (path,) = unpacked.rglob("*.pth")
    weights = torch.load(path, weights_only=True)
    config = MobileNetV2Config(num_labels=1000, tf_padding=False, layer_norm_eps=1e-5, image_size=224)
    model = MobileNetV2ForImageClassification(config)
    # Both list their tensors in the order of execution; only the counters of batches are ours alone.
    own = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    theirs = [t for name, t in weights.items() if not name.endswith("num_batches_tracked")]
    shapes = [model.state_dict()[name].shape for name in own]
    if shapes != [t.shape for t in theirs]:
        raise ValueError("the tensors of MobileNetV2 do not match in number or shape")
    model.load_state_dict(dict(zip(own, theirs, strict=True)), strict=False)
    model.save_pretrained(out)
    pictures(out, 224, 256, resample=2)
