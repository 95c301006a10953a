"""Default options of methods, starts and optimisers, as their papers or PEFT have them."""

from __future__ import annotations

from typing import Any

RANK = {"rank": 8}
LOW = {"rank": 8, "alpha": None, "stabilised": False, "dropout": 0.0, "init": "kaiming", "init_options": None}
FEEDFORWARD = "down_proj fc2 fc_out mlp.c_proj dense_4h_to_h DenseReluDense.wo output.dense"
# Every option but the seed. Other than PEFT's: a rank of 8 where PEFT has another number for each method.
METHODS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 12, "target": 8, "alpha": None, "begin": 0.1, "end": 0.3, "every": 10}
    | {"orthogonality": 0.1, "dropout": 0.0},
    "bat": {"rank": 64},
    "bitfit": {},
    "boft": {"block": 4, "factors": 1},
    "bottleneck": {"rank": 64, "placement": "houlsby", "activation": "relu", "scaling": None, "dropout": 0.0},
    "dense": {},
    "dora": LOW,
    "flora": {"rank": 1},
    "fourierft": {"frequencies": 1000, "grid": False, "rms": 1.8e-4, "scaling": None},
    "full": {},
    "hira": {"rank": 32, "dropout": 0.0},
    "hra": RANK,
    "ia3": {"feedforward": tuple(FEEDFORWARD.split())},
    "loha": {"rank": 8, "alpha": None},
    "lokr": {"rank": 8, "alpha": None, "factor": -1, "both": False},
    "loldu": {"rank": 64, "alpha": None, "basis": "lu"},
    "lora": LOW,
    "lorafa": LOW,
    "loraxs": {"rank": 32, "alpha": None, "dropout": 0.0},
    "miss": {"rank": 64, "mini": None, "dropout": 0.0},
    "oft": {"block": 32, "terms": 6, "shared": False},
    "prefix": {"length": 16, "start": 0.1},
    "randlora": {"rank": 32, "alpha": None, "dropout": 0.0},
    "shira": {"rank": 8, "numbers": None},
    "vera": {"rank": 256, "start": 0.1, "dropout": 0.0},
}
STARTS: dict[str, dict[str, Any]] = {
    "corda": {"mode": "instruction"},
    "gora": {"gamma": 0.05},
    "keeplora": {"protected": 0.5},
    "loraga": {"gamma": 16.0, "direction": "ArB2r"},
    "orthogonal": {"size": 0.1},
}
OPTIMISERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "balanced": {"floor": 0.1},
    "galore": {"rank": 128, "period": 200, "scale": 0.25, "adam": True},
    "lora-muon": {"damping": 0.05},
    "loraplus": {"ratio": 16.0},
    "lorapro": {"form": "factored", "x": "sylvester", "damping": 0.01},
    "scaled": {"damping": 0.05},
}
