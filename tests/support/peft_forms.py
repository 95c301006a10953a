"""Settings and tensors of every method in PEFT's form, for one layer and no option at its default."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

OUT, IN = 8, 12


class Form(NamedTuple):
    """A change with no option at its default, the settings that a file of it has, and the tensors."""

    method: str
    options: dict[str, Any]
    config: dict[str, Any]
    tensors: Callable[[Any], dict[str, Tensor]]
    layer: Callable[[], nn.Module] = lambda: nn.Linear(IN, OUT)
    reader: str = ""  # if another method reads it


def lora_names(d: Any) -> dict[str, Tensor]:
    return {"lora_A.weight": d.A, "lora_B.weight": d.B}


def lora_of_a_start(d: Any) -> dict[str, Tensor]:
    A, B = torch.cat([d.A, d.A - d.A0]), torch.cat([d.B - d.B0, d.B0], 1)
    return {"lora_A.weight": A, "lora_B.weight": B}


def dora_names(d: Any) -> dict[str, Tensor]:
    return {**lora_names(d.lora), "lora_magnitude_vector": d.m}


LORA = {"rank": 3, "alpha": 6.0, "dropout": 0.25, "seed": 4}
LORA_CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6.0, "lora_dropout": 0.25, "use_rslora": False}
ADALORA = {"init_r": 4, "target_r": 2, "lora_dropout": 0.25, "orth_reg_weight": 0.3, "peft_type": "ADALORA"}
MISS = {"peft_type": "MISS", "r": 5, "miss_dropout": 0.25, "mini_r": 1, "init_weights": True}
OFT = {"peft_type": "OFT", "oft_block_size": 4, "peft_version": "0.18.0"}
FOURIER = {"peft_type": "FOURIERFT", "n_frequency": 7, "random_loc_seed": 5}

FORMS = {
    "lora": Form("lora", LORA, LORA_CONFIG, lora_names),
    "rslora": Form("lora", {**LORA, "stabilised": True}, {**LORA_CONFIG, "use_rslora": True}, lora_names),
    "pissa": Form(  # s = 6 / 3 at rank 3, and at the rank 6 of the file
        "lora",
        {**LORA, "init": "pissa"},
        {**LORA_CONFIG, "r": 6, "lora_alpha": 12.0, "start_rank": 3},
        lora_of_a_start,
    ),
    "stabilised pissa": Form(
        "lora",
        {**LORA, "init": "pissa", "stabilised": True},
        {**LORA_CONFIG, "use_rslora": True, "r": 6, "lora_alpha": 6 * math.sqrt(2), "start_rank": 3},
        lora_of_a_start,
    ),
    "lora of a convolution": Form(
        "lora",
        LORA,
        LORA_CONFIG,
        lambda d: {"lora_A.weight": d.A.view(3, 4, 3, 2), "lora_B.weight": d.B[..., None, None]},
        lambda: nn.Conv2d(4, OUT, (3, 2)),
    ),
    "lora of an embedding": Form(
        "lora",
        LORA,
        LORA_CONFIG,
        lambda d: {"lora_embedding_A": d.A, "lora_embedding_B": d.B},
        lambda: nn.Embedding(IN, OUT),
    ),
    "lorafa": Form("lorafa", LORA, LORA_CONFIG, lora_names, reader="lora"),
    "stabilised lorafa": Form(
        "lorafa", {**LORA, "stabilised": True}, {**LORA_CONFIG, "use_rslora": True}, lora_names, reader="lora"
    ),
    "dora": Form("dora", LORA, {**LORA_CONFIG, "use_dora": True}, dora_names),
    "dora of a convolution": Form(
        "dora",
        LORA,
        {**LORA_CONFIG, "use_dora": True},
        lambda d: {
            "lora_A.weight": d.lora.A.view(3, 4, 3, 2),
            "lora_B.weight": d.lora.B[..., None, None],
            "lora_magnitude_vector": d.m[None, :, None, None],
        },
        lambda: nn.Conv2d(4, OUT, (3, 2)),
    ),
    "adalora": Form(
        "adalora",
        {"rank": 4, "target": 2, "alpha": 6.0, "dropout": 0.25, "orthogonality": 0.3},
        {**ADALORA, "lora_alpha": 1.5 * 4.00001, "kept": 4},  # PEFT divides by the rank and 1e-5
        lambda d: {"lora_A": d.A, "lora_B": d.B, "lora_E": d.E},
    ),
    "lokr": Form(
        "lokr",
        {"rank": 1, "alpha": 3.0, "factor": 4, "both": True, "seed": 2},
        {"peft_type": "LOKR", "r": 1, "alpha": 3.0, "decompose_factor": 4, "decompose_both": True},
        lambda d: {"lokr_w1_a": d.Lb, "lokr_w1_b": d.La, "lokr_w2_a": d.B, "lokr_w2_b": d.A},
    ),
    "lokr of one product": Form(
        "lokr",
        {"rank": 1, "alpha": 3.0, "factor": 2, "seed": 2},
        {"peft_type": "LOKR", "r": 1, "alpha": 3.0, "decompose_factor": 2, "decompose_both": False},
        lambda d: {"lokr_w1": d.L, "lokr_w2_a": d.B, "lokr_w2_b": d.A},
    ),
    "lokr of a convolution": Form(
        "lokr",
        {"rank": 2, "alpha": 3.0, "factor": 2, "seed": 2},
        {"peft_type": "LOKR", "r": 2, "alpha": 3.0, "decompose_factor": 2, "decompose_both": False},
        lambda d: {"lokr_w1": d.L, "lokr_w2": d.R.view(4, 2, 3, 2)},
        lambda: nn.Conv2d(4, OUT, (3, 2)),
    ),
    "loha": Form(
        "loha",
        {"rank": 3, "alpha": 2.0, "seed": 2},
        {"peft_type": "LOHA", "r": 3, "alpha": 2.0},
        lambda d: {"hada_w1_a": d.B1, "hada_w1_b": d.A1, "hada_w2_a": d.B2, "hada_w2_b": d.A2},
    ),
    "hra": Form("hra", {"rank": 4, "seed": 2}, {"peft_type": "HRA", "r": 4}, lambda d: {"hra_u": d.U}),
    "hira": Form(
        "hira",
        {"rank": 3, "dropout": 0.25, "seed": 2},
        {"peft_type": "HIRA", "r": 3, "hira_dropout": 0.25},
        lambda d: {"hira_A": d.A, "hira_B": d.B},
    ),
    "hira of an embedding": Form(
        "hira",
        {"rank": 3, "dropout": 0.25, "seed": 2},
        {"peft_type": "HIRA", "r": 3, "hira_dropout": 0.25},
        lambda d: {"hira_embedding_A": d.A, "hira_embedding_B": d.B},
        lambda: nn.Embedding(IN, OUT),
    ),
    "shira": Form(
        "shira",
        {"rank": 3, "seed": 2},
        {"peft_type": "SHIRA", "r": 3},
        lambda d: {"shira_weight": d.v, "shira_indices": torch.stack([d.places // IN, d.places % IN]).int()},
    ),
    "miss": Form("miss", {"rank": 5, "dropout": 0.25}, MISS, lambda d: {"miss_block": d.D.mT}),
    "miss mini": Form(
        "miss",
        {"rank": 5, "mini": 4, "dropout": 0.25},
        {**MISS, "mini_r": 4, "init_weights": "mini"},
        lambda d: {"miss_block": d.D.mT},
    ),
    "bat": Form(
        "bat",
        {"rank": 2},
        {**MISS, "r": 2, "miss_dropout": 0.0, "init_weights": "bat"},
        lambda d: {"miss_block": d.B},
    ),
    "ia3 of outputs": Form(
        "ia3",
        {"feedforward": ("mlp.down", "fc+2")},
        {"peft_type": "IA3", "feedforward_modules": r".*(mlp\.down|fc\+2)"},
        lambda d: {"ia3_l": d.l[:, None]},
        lambda: nn.Linear(IN, OUT, bias=False),  # which is multiplied too
    ),
    "ia3 of inputs": Form(
        "ia3",
        {"feedforward": "la.*"},
        {"peft_type": "IA3", "feedforward_modules": "la.*"},
        lambda d: {"ia3_l": d.l[None]},
    ),
    "oft": Form(
        "oft",
        {"block": 4, "terms": 7},
        {**OFT, "block_share": False, "use_cayley_neumann": True, "num_cayley_neumann_terms": 7},
        lambda d: {"oft_R.weight": d.Q},
    ),
    "oft shared and exact": Form(
        "oft",
        {"block": 4, "terms": 0, "shared": True},
        {**OFT, "block_share": True, "use_cayley_neumann": False, "num_cayley_neumann_terms": 5},
        lambda d: {"oft_R.weight": d.Q},
    ),
    "oft of one block": Form(
        "oft",
        {"block": IN, "terms": 2},
        {
            **OFT,
            "oft_block_size": IN,
            "block_share": False,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 2,
        },
        lambda d: {"oft_R.weight": d.Q},
    ),
    "oft of an embedding": Form(
        "oft",
        {"block": 4, "terms": 3},
        {**OFT, "block_share": False, "use_cayley_neumann": True, "num_cayley_neumann_terms": 3},
        lambda d: {"oft_embedding_R.weight": d.Q},
        lambda: nn.Embedding(IN, OUT),
    ),
    "boft": Form(
        "boft",
        {"block": 6, "factors": 2},
        {"peft_type": "BOFT", "boft_block_size": 6, "boft_n_butterfly_factor": 2},
        lambda d: {"boft_R": d.P, "boft_s": d.s[:, None]},
    ),
    "vera": Form(
        "vera",
        {"rank": 5, "start": 0.2, "dropout": 0.25, "seed": 3},
        {
            "peft_type": "VERA",
            "r": 5,
            "vera_dropout": 0.25,
            "d_initial": 0.2,
            "projection_prng_key": 3,
            "own_scale": 2 / math.sqrt(IN * 5),
        },
        lambda d: {"vera_lambda_b": d.b, "vera_lambda_d": d.d * (2 / math.sqrt(IN * 5))},
    ),
    "randlora": Form(
        "randlora",
        {"rank": 5, "alpha": 6.0, "dropout": 0.25, "seed": 3},
        {
            "peft_type": "RANDLORA",
            "r": 5,
            "randlora_alpha": 6.0,
            "randlora_dropout": 0.25,
            "projection_prng_key": 3,
        },
        lambda d: {"randlora_lambda": d.l, "randlora_gamma": d.g},
    ),
    "fourierft": Form(
        "fourierft",
        {"frequencies": 7, "scaling": 30.0, "seed": 5},
        {**FOURIER, "scaling": 30.0},
        lambda d: {"fourierft_spectrum": d.c, "fourierft_indices": torch.stack([d.rows, d.columns])},
    ),
    "fourierft by rms": Form(
        "fourierft",
        {"frequencies": 7, "rms": 0.5, "seed": 5},
        {**FOURIER, "scaling": 150.0, "own_scaling": 0.5 * math.sqrt(2) * OUT * IN},
        lambda d: {
            "fourierft_spectrum": d.c * (0.5 * math.sqrt(2) * OUT * IN / 150),
            "fourierft_indices": torch.stack([d.rows, d.columns]),
        },
    ),
}
