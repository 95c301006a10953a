"""The settings of a compression, and the published methods as presets of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from veneer.errors import ConfigError, suggest
from veneer.settings import Range, Settings, setting


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Settings of a low-rank compression.

    The norm in which a matrix is approximated (metric) is that of W itself (weights), of the outputs E |Dx|^2
    (inputs, SVD-LLM's whitening), of the outputs about their mean, which a bias takes over (outputs by the
    outputs' covariance, LoRD's way, or centred by the inputs'), or of the loss: E |Dx|^2 weighed by its
    curvature at the layer's outputs, token by token (fisher).
    """

    PANEL = "Method"

    keep: float = setting(0.8, "share of the compressed layers' parameters that stays, added biases included")
    metric: Literal["weights", "outputs", "inputs", "centred", "fisher"] = setting(
        "fisher", "norm of the approximation: weights, outputs (LoRD), inputs (SVD-LLM), centred, fisher"
    )
    centre: Literal["never", "always", "choose"] = setting(
        "choose", "in the fisher metric, biases for the inputs' mean: never, always, or where they pay"
    )
    allocate: Literal["uniform", "heap", "ilp"] = setting(
        "heap",
        "ranks alike (uniform), or by predicted loss of all layers, dense where that is best (heap, ilp)",
    )
    score: Literal["curvature", "gradients", "mean"] = setting(
        "mean", "predicted loss of a direction: by curvature, by gradients of samples, or their mean"
    )
    anchored: bool = setting(False, "fit the original outputs from the inputs that compressed layers give")
    refine: int = setting(0, "epochs of training of every compressed block on the original one's outputs")
    rate: float = setting(1e-3, "learning rate of the refinement")
    storage: Literal["plain", "pivoted"] = setting(
        "plain", "two factors, or pivot rows with r^2 numbers fewer"
    )
    multiple: int = setting(0, "ranks are multiples of it; 0: 1, 8 or 64 by the layer's size")

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every value out of range or contradiction."""
        yield from Range("above 0 and at most 1", ("keep",), 0, 1 + 1e-12, open=True).problems(self)
        yield from Range("0 or more", ("refine", "multiple"), 0).problems(self)
        yield from Range("above 0", ("rate",), 0, open=True).problems(self)
        if self.allocate != "uniform" and self.metric != "fisher":
            yield (
                f"allocate={self.allocate!r} compares layers by the loss, which"
                f" metric={self.metric!r} does not measure; use metric='fisher' or allocate='uniform'"
            )

    @property
    def surveys(self) -> bool:
        """True if gradients of the loss are measured before the first block is compressed."""
        return self.metric == "fisher"

    @property
    def adds_bias(self) -> bool:
        """True if every layer gets a bias for the mean's part."""
        return self.metric in ("outputs", "centred") or (self.metric == "fisher" and self.centre == "always")

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


REFINED = {"refine": 8}
PRESETS: dict[str, dict[str, Any]] = {
    "svd": {"metric": "weights", "allocate": "uniform"},
    "lord": {"metric": "outputs", "allocate": "uniform"},
    "svd-llm": {"metric": "inputs", "allocate": "uniform"},
    "centred": {"metric": "centred", "allocate": "uniform"},
    "fisher": {"metric": "fisher", "allocate": "uniform", "centre": "never"},
    "allocate": {"metric": "fisher", "centre": "never"},
    "anchored": {"metric": "inputs", "allocate": "uniform", "anchored": True},
    "refine": {"metric": "inputs", "allocate": "uniform", **REFINED},
    "fast": {"metric": "fisher", "centre": "never", "anchored": True, "storage": "pivoted"},
    "auto": {"metric": "fisher", "storage": "pivoted", **REFINED},
}


def recipe(method: str = "auto", keep: float = 0.8, **changed: Any) -> Recipe:
    """Returns a preset with other settings. Raises ConfigError for an unknown preset or setting, and for bad
    values.
    """
    if method not in PRESETS:
        raise ConfigError(f"unknown method {method!r} of compression{suggest(method, PRESETS)}")
    known = {f.name for f in fields(Recipe)}
    unknown = [f"unknown setting {name!r}{suggest(name, known)}" for name in changed if name not in known]
    if unknown:
        raise ConfigError("\n".join(unknown))
    return replace(Recipe(), **{**PRESETS[method], "keep": keep, **changed})
