"""The settings of a compression, and the published methods as presets of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from veneer.errors import ConfigError, suggest

Metric = Literal["weights", "outputs", "inputs", "centred", "fisher"]


@dataclass(frozen=True)
class Recipe:
    """What a compression does with each layer.

    keep: share of the parameters of the compressed layers that is kept, added biases included
    metric: norm in which a matrix is approximated. weights: the SVD of W. inputs: E |Dx|^2, SVD-LLM's
    whitening.
      outputs: the eigenvectors of the outputs' covariance, LoRD. centred: the same optimum by the inputs'
      covariance;
      both with the mean in a bias. fisher: E |Dx|^2 weighed by the loss's curvature at the layer's outputs,
      token by token
    centre: in the fisher metric, whether a bias takes the mean's part: never, always, or where it pays
    allocate: ranks alike (uniform), or by predicted loss over all layers (heap, ilp), where a layer may stay
    dense
    score: predicted loss of a singular direction in the fisher metric: curvature, gradients of samples, or
    their mean
    anchored: approximate the original outputs from the inputs that compressed layers give
    refine: epochs of training of each compressed block on the original block's outputs
    rate: learning rate of that training
    storage: plain (two factors) or pivoted (r^2 numbers fewer)
    multiple: ranks are multiples of it; 0: by the layer's size

    """

    keep: float = 0.8
    metric: Metric = "fisher"
    centre: Literal["never", "always", "choose"] = "choose"
    allocate: Literal["uniform", "heap", "ilp"] = "heap"
    score: Literal["curvature", "gradients", "mean"] = "mean"
    anchored: bool = False
    refine: int = 0
    rate: float = 1e-3
    storage: Literal["plain", "pivoted"] = "plain"
    multiple: int = 0

    def __post_init__(self) -> None:
        problems = [] if 0 < self.keep <= 1 else [f"keep must be above 0 and at most 1, got {self.keep}"]
        if self.refine < 0:
            problems.append(f"refine must be 0 or more epochs, got {self.refine}")
        if self.rate <= 0:
            problems.append(f"rate must be above 0, got {self.rate}")
        if self.multiple < 0:
            problems.append(f"multiple must be 0 or more, got {self.multiple}")
        if self.allocate != "uniform" and self.metric != "fisher":
            problems.append(
                f"allocate={self.allocate!r} compares layers by the loss, which metric={self.metric!r} does not measure;"
                f" use metric='fisher' or allocate='uniform'"
            )
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def surveys(self) -> bool:
        """Whether gradients of the loss are measured before the first block is compressed."""
        return self.metric == "fisher"

    @property
    def adds_bias(self) -> bool:
        """Whether every layer gets a bias for the mean's part."""
        return self.metric in ("outputs", "centred") or (self.metric == "fisher" and self.centre == "always")

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


REFINED = {"refine": 16}
PRESETS: dict[str, dict[str, Any]] = {
    "svd": {"metric": "weights", "allocate": "uniform"},
    "lord": {"metric": "outputs", "allocate": "uniform"},
    "svd-llm": {"metric": "inputs", "allocate": "uniform"},
    "centred": {"metric": "centred", "allocate": "uniform"},
    "fisher": {"metric": "fisher", "allocate": "uniform", "centre": "never"},
    "allocate": {"metric": "fisher", "centre": "never"},
    "refine": {"metric": "inputs", "allocate": "uniform", **REFINED},
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
