"""Fashion-MNIST with few labels: a linear probe, LoRA and full fine-tuning of two pretrained models."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer
from veneer.ops.matrix.linalg import multiplies_bf16

TRAIN, TEST, SEEDS, BATCH, RANK = 1000, 5000, 3, 32, 8
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Kind(NamedTuple):
    """A model, the size of its pictures, layers that LoRA adapts and rates found on other pictures."""

    folder: str
    auto: str
    size: int
    epochs: int
    to: Any
    lora: float
    full: float


KINDS = {
    "vit": Kind("dinov2", "Dinov2ForImageClassification", 56, 4, "all-linear", 1e-3, 5e-5),
    "mobilenet": Kind(
        "mobilenet",
        "MobileNetV2ForImageClassification",
        64,
        6,
        r".*(expand_1x1|reduce_1x1|conv_1x1)\.convolution",
        5e-3,
        1e-3,
    ),
}


def split(real: Path, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns pictures (n, 3, size, size) and classes to learn, drawn by the seed, and the same test set."""
    data = load_file(real / "fashion" / "data.safetensors")
    order = torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(0))
    test, rest = order[:TEST], order[TEST:]
    train = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed + 1))[:TRAIN]]

    def pictures(some: Tensor) -> Tensor:
        x = data["pixels"][some].float().view(-1, 1, 28, 28) / 255
        x = F.interpolate(x, (size, size), mode="bicubic", align_corners=False).clamp(0, 1)
        return (x - MEAN.view(3, 1, 1)) / DEVIATION.view(3, 1, 1)

    return pictures(train), data["labels"][train].long(), pictures(test), data["labels"][test].long()


def model_of(real: Path, kind: Kind) -> Any:
    """Returns the pretrained model with a new head of ten classes."""
    import transformers

    torch.manual_seed(0)
    auto = getattr(transformers, kind.auto)
    options = {"num_labels": 10, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    return auto.from_pretrained(real / kind.folder, **options).eval()


def forward(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16(x.device)):
        logits: Tensor = model(pixel_values=x).logits
    return logits.float()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    return float(torch.cat([forward(model, some).argmax(1) for some in x.split(100)]).eq(y).double().mean())


def probe(model: Any, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """Returns the accuracy of a linear classifier of the features that the head sees."""
    seen: list[Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().float()))
    x, y, xt, yt = data
    with torch.no_grad():
        for some in (*x.split(100), *xt.split(100)):
            forward(model, some)
    handle.remove()
    features = torch.cat(seen)
    features = (features - features[: len(x)].mean(0)) / features[: len(x)].std(0).clamp_min(1e-6)
    head = nn.Linear(features.shape[1], 10)
    adam = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(300):
        adam.zero_grad()
        F.cross_entropy(head(features[: len(x)]), y).backward()
        adam.step()
    return float(head(features[len(x) :]).argmax(1).eq(yt).double().mean())


def learn(
    model: Any, kind: Kind, method: str, data: tuple[Tensor, Tensor, Tensor, Tensor], seed: int
) -> float:
    """Trains and returns the accuracy on the test pictures."""
    x, y, xt, yt = data
    if method == "lora":
        head = [
            f"{n}.{k}" for n, m in model.named_modules() if n == "classifier" for k, _ in m.named_parameters()
        ]
        veneer.attach(model, "lora", to=kind.to, rank=RANK, alpha=2 * RANK, seed=seed)
        for name, p in model.named_parameters():
            if name in head:
                p.requires_grad_(True)
    parameters, rate = [p for p in model.parameters() if p.requires_grad], getattr(kind, method)
    adam = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    draw, steps = torch.Generator().manual_seed(seed), kind.epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=steps, pct_start=0.1)
    model.eval()  # the statistics of batch norms stay those of the base in both ways
    for _ in range(kind.epochs):
        order = torch.randperm(len(x), generator=draw)
        for at in range(0, len(x) - BATCH + 1, BATCH):
            some = order[at : at + BATCH]
            F.cross_entropy(forward(model, x[some]), y[some]).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            adam.zero_grad()
            schedule.step()
    return accuracy(model, xt, yt)


def compare(real: Path, name: str, way: str, seed: int) -> dict[str, float]:
    """Returns the accuracy of one way at one seed; with LoRA its trained share too."""
    kind = KINDS[name]
    data, model = split(real, kind.size, seed), model_of(real, kind)
    if way == "linear_probe":
        return {f"{name}_{way}_{seed}": probe(model, data)}
    found = {f"{name}_{way}_{seed}": learn(model, kind, way, data, seed)}
    if way == "lora":
        own = [p.numel() for p in model.parameters() if p.requires_grad]
        found[f"{name}_lora_share_{seed}"] = sum(own) / sum(p.numel() for p in model.parameters())
    return found


def averaged(figures: dict[str, float]) -> dict[str, float]:
    """Returns figures with means and deviations in place of those that end with a seed."""
    found = {k: v for k, v in figures.items() if not k[-2:-1] == "_" or not k[-1].isdigit()}
    for name in dict.fromkeys(k[:-2] for k in figures if k not in found):
        values = [figures[key] for seed in range(SEEDS) if (key := f"{name}_{seed}") in figures]
        found[name] = statistics.mean(values)
        if len(values) > 1 and not name.endswith("share"):
            found[f"{name}_sd"] = statistics.stdev(values)
    return found
