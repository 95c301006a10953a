"""Saved adapters load to the same numbers, and every fault of a folder is reported."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import models
from torch import Tensor, nn

import veneer
from veneer import files, methods
from veneer.adapt import attached, hooks
from veneer.adapt.attached import changes
from veneer.adapt.hooks import hang
from veneer.adapt.peft import settings as peft_settings
from veneer.adapt.store import fingerprint, store
from veneer.errors import ConfigError, FormatError, NotMergeable
from veneer.sites import LeafSite

TENSORS, CONFIG, MANIFEST = peft_settings.TENSORS, peft_settings.CONFIG, "veneer.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def adapted(method: str = "lora", build: Any = models.llama, **options: Any) -> nn.Module:
    model = veneer.attach(build(), method, **{"rank": 3, "to": ["q_proj", "down_proj"], **options})
    models.randomise(model)
    return model


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(42, 3)).eval()


def state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    return {f"{s.name}.{k}": t for s, d in changes(model, name) for k, t in d.state_dict().items()}


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return found


def edit(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def retensor(folder: Path, **changed: Tensor | None) -> None:
    """Other tensors in the file, with a manifest that vouches for them."""
    found = load_file(folder / TENSORS)
    found.update({k: t for k, t in changed.items() if t is not None})
    save_file(
        {k: t for k, t in found.items() if changed.get(k, t) is not None}, folder / TENSORS, {"format": "pt"}
    )
    tensors = {**manifest(folder)["tensors"], "sha256": files.sha256(folder / TENSORS)}
    edit(folder / MANIFEST, tensors=tensors)


def test_the_only_adapter_is_saved_whatever_its_name(tmp_path: Path) -> None:
    model = veneer.attach(models.llama(), rank=2, name="french")
    models.randomise(model, "french")
    veneer.save(model, tmp_path / "one")
    with pytest.raises(ConfigError, match="the model has no adapter; attach one first"):
        veneer.save(models.llama(), tmp_path / "none")
    veneer.attach(model, rank=2, name="formal")
    with pytest.raises(ConfigError, match="several adapters, name one of them: french, formal"):
        veneer.save(model, tmp_path / "two")
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_the_folder_of_a_run_stands_for_the_adapter_in_it(tmp_path: Path) -> None:
    model = adapted()
    veneer.save(model, tmp_path / "run" / "adapter")
    loaded = veneer.load(models.llama(), tmp_path / "run")
    assert state(loaded).keys() == state(model).keys()
    assert all(torch.equal(t, state(model)[k]) for k, t in state(loaded).items())
    other = adapted(rank=2)
    veneer.save(other, tmp_path / "run")  # an adapter in the folder itself comes first
    assert state(veneer.load(models.llama(), tmp_path / "run")).keys() == state(other).keys()
    assert next(iter(changes(veneer.load(models.llama(), tmp_path / "run"), "default")))[1].A.shape[0] == 2


def refusal(folder: Path, model: nn.Module | None = None, **options: Any) -> str:
    """The text of the error of loading; the model must be as it was."""
    model = model or models.llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FormatError) as e:
        veneer.load(model, folder, **options)
    assert not veneer.adapters(model) and not any(m._forward_hooks for m in model.modules())
    assert before.keys() == model.state_dict().keys() and all(
        torch.equal(t, before[k]) for k, t in model.state_dict().items()
    )
    return str(e.value)


# What comes back


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("lora", dict(init="pissa", alpha=5)),
        ("lora", dict(init="olora", stabilised=True)),
        ("dora", dict(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 1.5})),
        ("dora", dict(init="pissa", dropout=0.2)),
    ],
)
def test_save_and_load_are_the_identity(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    ours = adapted(method, seed=7, **options)
    again = veneer.load(models.llama(), veneer.save(ours, tmp_path), "other")
    old, new = state(ours), state(again, "other")
    assert old.keys() == new.keys()
    for k in old:  # a start is kept as a difference, so that it comes back up to one rounding of float32
        torch.testing.assert_close(
            new[k],
            old[k],
            rtol=0 if "init" not in options else 3e-7,
            atol=0 if "init" not in options else 1e-7,
        )
    torch.testing.assert_close(
        models.output(again), models.output(ours), rtol=0, atol=0 if "init" not in options else 1e-5
    )
    assert [d.options for _, d in changes(again, "other")] == [d.options for _, d in changes(ours, "default")]
    assert veneer.active(again) == {"other": 1.0}


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    rank=st.integers(1, 8),
    method=st.sampled_from(["lora", "dora"]),
    init=st.sampled_from(["kaiming", "pissa", "olora"]),
    alpha=st.none() | st.floats(0.5, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_adapter_comes_back(
    tmp_path: Path, rank: int, method: str, init: str, alpha: float | None, dtype: torch.dtype, seed: int
) -> None:
    def build() -> nn.Module:
        torch.manual_seed(seed)
        return (
            nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 8, bias=False))
            .to(dtype)
            .eval()
        )

    ours = veneer.attach(build(), method, to=["0", "1", "3"], rank=rank, init=init, alpha=alpha, seed=seed)
    models.randomise(ours, seed=seed)
    ids = torch.arange(11)[None]
    veneer.save(ours, tmp_path, probe={"input": ids})
    again = veneer.load(build(), tmp_path)
    scale = float(ours(ids).detach().abs().max())
    steps = 4 if init == "kaiming" else 64
    torch.testing.assert_close(
        again(ids),
        ours(ids),
        rtol=0,
        atol=steps * scale * (0 if init == "kaiming" else torch.finfo(dtype).eps),
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_the_tensors_can_be_read_by_whom_the_settings_can(tmp_path: Path) -> None:
    veneer.save(adapted(), tmp_path / "a")
    assert len({f.stat().st_mode for f in (tmp_path / "a").iterdir()}) == 1


def test_what_the_manifest_says(tmp_path: Path) -> None:
    ours = adapted(alpha=6, seed=5, stabilised=True)
    veneer.save(ours, tmp_path)
    found = manifest(tmp_path)
    assert (found["format"], found["veneer"], found["layout"], found["method"], found["seed"]) == (
        1,
        veneer.__version__,
        "peft",
        "lora",
        5,
    )
    assert found["options"] == dict(
        rank=3, alpha=6, stabilised=True, dropout=0.0, init="kaiming", init_options=None, seed=5
    )
    assert found["tensors"]["sha256"] == files.sha256(tmp_path / TENSORS)
    assert found["tensors"]["bytes"] == (tmp_path / TENSORS).stat().st_size
    assert found["allow"] == [] and found["no_probe"] is None
    for site, delta in changes(ours, "default"):
        entry = found["sites"][site.name]
        assert (entry["method"], entry["kind"], entry["rank"], entry["scaling"]) == (
            "lora",
            "linear",
            3,
            6 / 3**0.5,
        )
        assert entry["norm"] == pytest.approx(float(delta.delta(site).detach().norm()), rel=1e-5)
        assert entry["base_norm"] == pytest.approx(float(site.weight().detach().norm()), rel=1e-5)


def test_ranks_of_single_layers_are_in_the_manifest(tmp_path: Path) -> None:
    veneer.save(adapted("dora", rank_pattern={"layers.1.mlp.down_proj": 5}), tmp_path)
    sites = manifest(tmp_path)["sites"]
    assert (
        sites["model.layers.1.mlp.down_proj"]["options"] == {"rank": 5}
        and sites["model.layers.1.mlp.down_proj"]["rank"] == 5
    )
    assert (
        sites["model.layers.0.mlp.down_proj"]["options"] == {}
        and sites["model.layers.0.mlp.down_proj"]["rank"] == 3
    )


def test_only_a_trainable_one_takes_gradients(tmp_path: Path) -> None:
    veneer.save(adapted(), tmp_path)
    model = veneer.load(models.llama(), tmp_path, "a")
    assert not [n for n, p in model.named_parameters() if ".deltas.a" in n and p.requires_grad]
    veneer.load(model, tmp_path, "b", trainable=True)
    assert {n.split(".deltas.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        "b"
    }


def test_a_loaded_adapter_is_beside_the_others(tmp_path: Path) -> None:
    veneer.save(adapted(), tmp_path / "a")
    veneer.save(adapted("dora", seed=3), tmp_path / "b")
    model = veneer.load(veneer.load(models.llama(), tmp_path / "a", "a"), tmp_path / "b", "b")
    assert veneer.active(model) == {"a": 1.0, "b": 1.0}
    for name in ("a", "b"):
        with veneer.using(model, name):
            assert torch.equal(
                models.output(model), models.output(veneer.load(models.llama(), tmp_path / name))
            )
    with pytest.raises(ConfigError, match="an adapter called 'b' is already attached"):
        veneer.load(model, tmp_path / "a", "b")


# Our own layout


def test_what_peft_cannot_express_is_kept_in_our_own_layout(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 9)
    for method, options in (("lora", {}), ("dora", {}), ("lora", dict(init="pissa"))):
        ours = veneer.attach(grouped(), method, to=["0", "2"], rank=2, **options)
        models.randomise(ours)
        veneer.save(ours, tmp_path, probe={"input": x})
        assert sorted(os.listdir(tmp_path)) == ["delta.safetensors", MANIFEST]
        again = veneer.load(grouped(), tmp_path)
        assert torch.equal(again(x), ours(x))
        assert state(again).keys() == state(ours).keys()


def full(build: Any = models.llama, size: float = 0.05) -> nn.Module:
    """Every parameter of the model changed a little, as full fine-tuning leaves it; the head as it was."""
    model = build()
    draw = torch.Generator().manual_seed(0)
    found = []
    for n, m in model.named_modules():
        if any(True for _ in m.parameters(recurse=False)):
            site = LeafSite(n, m)
            delta = methods.build(methods.get("full"), site, {})
            if n != "lm_head":
                with torch.no_grad():
                    next(delta.parameters()).copy_(size * torch.randn(site.out, 1, generator=draw))
            found.append((site, delta))
    hang(model, "default", found)
    return model


def test_full_fine_tuning(tmp_path: Path) -> None:
    ours = full()
    veneer.save(ours, tmp_path)
    assert manifest(tmp_path)["method"] == "full" and manifest(tmp_path)["layout"] == "native"
    assert torch.equal(models.output(veneer.load(models.llama(), tmp_path)), models.output(ours))


def test_another_layout_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    veneer.save(adapted(), tmp_path)
    veneer.save(full(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["delta.safetensors", MANIFEST]
    veneer.save(adapted(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS, MANIFEST]


def test_what_our_own_layout_refuses(tmp_path: Path) -> None:
    veneer.save(full(), tmp_path)
    path = tmp_path / "delta.safetensors"
    tensors = load_file(path)
    tensors["odd.D"], tensors["lm_head.D"] = torch.ones(2), torch.ones(5, 1)
    del tensors["model.norm.D"]
    save_file(tensors, path)
    sites = manifest(tmp_path)["sites"]
    edit(
        tmp_path / MANIFEST,
        sites={
            **sites,
            "gone": sites["lm_head"],
            "model.embed_tokens": {**sites["lm_head"], "method": "ful"},
        },
    )
    text = refusal(tmp_path)
    assert (
        "- delta.safetensors differs from the file that veneer.json describes: it was changed, or a save was"
        " cut off" in text
    )
    assert "- the model has no layer 'gone'" in text
    assert "- unknown method 'ful'; did you mean 'full'?" in text
    assert "- missing: model.norm.D (32, 1)" in text
    assert "- wrong shape: lm_head.D is (5, 1), the model asks for (3104, 1)" in text
    assert "- 1 tensors belong to no layer: odd.D (2,)" in text


# What is refused on loading


def test_another_base_is_refused_and_named(tmp_path: Path) -> None:
    veneer.save(adapted(), tmp_path)
    text = refusal(tmp_path, models.llama(seed=9))
    assert (
        "- another base: 16 of 21 weights have other values: model.embed_tokens.weight, " in text
    )  # norms are ones in both
    assert text.endswith("to go on all the same: allow=('base',)")
    other = models.llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert "another base: 1 of 21 weights have other values: model.layers.1.mlp.up_proj.weight" in refusal(
        tmp_path, other
    )
    veneer.load(other, tmp_path, allow=("base", "unused"))
    veneer.save(other, tmp_path / "again")
    assert manifest(tmp_path / "again")["allow"] == ["base"]


def test_a_base_of_another_shape(tmp_path: Path) -> None:
    veneer.save(adapted(to=["q_proj"]), tmp_path)
    text = refusal(tmp_path, models.llama(vocab_size=99, num_hidden_layers=3, attention_bias=True))
    assert (
        "weights have other shapes: model.embed_tokens.weight (97, 32) -> (99, 32), lm_head.weight (97, 32)"
        " -> (99, 32)" in text
    )
    assert (
        "another base: weights were not in the adapter's base: model.layers.0.self_attn.q_proj.bias" in text
    )
    assert "missing: model.layers.2.self_attn.q_proj.lora_A.weight (3, 32)" in text
    text = refusal(tmp_path, models.llama(num_hidden_layers=1))
    assert "another base: weights are not in this model: model.layers.1.input_layernorm.weight" in text
    assert (
        "2 tensors belong to no layer: base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight (3, 32)"
        in text
    )


def test_everything_is_said_at_once(tmp_path: Path) -> None:
    veneer.save(adapted(), tmp_path)
    down = "base_model.model.model.layers.1.mlp.down_proj"
    changed = {
        f"{Q}.lora_A.weight": torch.ones(4, 32),
        f"{Q}.lora_B.weight": None,
        f"{Q}.lora_C.weight": torch.ones(1),
    }
    changed |= {
        f"{down}.lora_A.weight": torch.full((3, 48), torch.nan),
        f"{down.replace('1', '0')}.lora_B.weight": torch.zeros(32, 3),
    }
    retensor(tmp_path, **changed)
    edit(tmp_path / MANIFEST, tensors={"sha256": "0"})
    other = models.llama()
    torch.nn.init.ones_(other.lm_head.weight)
    text = refusal(tmp_path, other)
    for line in (
        "another base: 1 of 21 weights have other values: lm_head.weight",
        "adapter_model.safetensors differs from the file that veneer.json describes: it was changed, or a"
        " save was cut off",
        "wrong shape: model.layers.0.self_attn.q_proj.lora_A.weight is (4, 32), the model and the settings"
        " ask for (3, 32)",
        "missing: model.layers.0.self_attn.q_proj.lora_B.weight (32, 3)",
        f"NaN or infinity in 1 of 8 tensors: {down}.lora_A.weight",
        "the change is zero at 1 of 3 layers, which have learned nothing: model.layers.0.mlp.down_proj",
    ):
        assert f"\n- {line}" in text
    assert "allow=" not in text  # not all of it can be let through


def test_unused_tensors(tmp_path: Path) -> None:
    veneer.save(adapted(), tmp_path)
    retensor(
        tmp_path, **{"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(3, 32)}
    )
    text = refusal(tmp_path)
    assert (
        "- 1 tensors belong to no layer: base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight (3,"
        " 32)\n" in text
    )
    assert text.endswith("to go on all the same: allow=('unused',)")
    veneer.load(models.llama(), tmp_path, allow=("unused",))


def test_a_file_that_was_changed(tmp_path: Path) -> None:
    ours = adapted()
    veneer.save(ours, tmp_path)
    edit(tmp_path / MANIFEST, tensors={"sha256": "0"})
    assert "differs from the file that veneer.json describes" in refusal(tmp_path)
    assert torch.equal(
        models.output(veneer.load(models.llama(), tmp_path, allow="sha256")), models.output(ours)
    )


def test_a_change_that_is_zero(tmp_path: Path) -> None:
    veneer.save(adapted(), tmp_path)
    retensor(tmp_path, **{f"{Q}.lora_B.weight": torch.zeros(32, 3)})
    text = refusal(tmp_path)
    assert (
        "the change is zero at 1 of 4 layers, which have learned nothing: model.layers.0.self_attn.q_proj\n"
        in text
    )
    assert text.endswith("allow=('norm', 'zero')")


def test_settings_that_were_edited(tmp_path: Path) -> None:
    veneer.save(adapted(to=["q_proj"], alpha=6), tmp_path)
    edit(tmp_path / CONFIG, lora_alpha=12)
    text = refusal(tmp_path)
    assert (
        "- 2 changes have another norm than when they were saved: model.layers.0.self_attn.q_proj (" in text
    )
    assert "were rank or alpha edited?" in text
    text = refusal(tmp_path, allow="norm")
    assert (
        "- probe: with the adapter on, outputs are " in text
        and "is allowed\nto go on all the same: allow=('probe',)" in text
    )
    veneer.load(models.llama(), tmp_path, allow=("norm", "probe"))
    edit(tmp_path / CONFIG, lora_alpha=6, exclude_modules=["layers.1.self_attn.q_proj"])
    assert "2 tensors belong to no layer" in refusal(tmp_path)
    retensor(tmp_path, **{f"{Q.replace('0', '1')}.lora_{f}.weight": None for f in "AB"})
    assert (
        "veneer.json and adapter_config.json name different layers: model.layers.1.self_attn.q_proj"
        in refusal(tmp_path)
    )


def test_two_kinds_of_change_of_one_layer(tmp_path: Path) -> None:
    veneer.save(full(), tmp_path)
    model = adapted()
    with pytest.raises(
        FormatError,
        match=r"another adapter holds model\.layers\.0\.mlp\.down_proj, .* as a site of another kind",
    ):
        veneer.load(model, tmp_path, "full")
    assert veneer.adapters(model) == ["default"]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (
            lambda d: (d / MANIFEST).write_text("{"),
            r"veneer\.json is not JSON: Expecting .*; restore it from a copy",
        ),
        (
            lambda d: (d / MANIFEST).write_text("[]"),
            r"veneer\.json holds a list, not an object with settings",
        ),
        (
            lambda d: edit(d / MANIFEST, format=9, veneer="3.1"),
            r"veneer\.json has format 9, not 1; read it with Veneer 3\.1, which",
        ),
        (
            lambda d: (d / MANIFEST).write_text('{"format": 1, "base": 0}'),
            r"veneer\.json lacks layout, method, options, sites, tensors,",
        ),
        (
            lambda d: (d / TENSORS).write_bytes((d / TENSORS).read_bytes()[:-9]),
            r"adapter_model\.safetensors is not a whole safetensors",
        ),
        (lambda d: (d / CONFIG).unlink(), r"there is no .*adapter_config\.json; restore it from a copy"),
        (lambda d: (d / TENSORS).unlink(), r"has no adapter_model\.safetensors"),
    ],
)
def test_a_damaged_folder(damage: Any, text: str, tmp_path: Path) -> None:
    veneer.save(adapted(), tmp_path)
    damage(tmp_path)
    with pytest.raises(FormatError, match=text):
        veneer.load(models.llama(), tmp_path)


def test_a_folder_that_is_not_there_or_no_adapter(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x").endswith(f"{tmp_path / 'x'}: the folder does not exist; check the path")
    assert "holds no adapter: it has neither veneer.json nor adapter_config.json" in refusal(tmp_path)


# What is refused on saving


def test_an_untrained_adapter_is_not_saved(tmp_path: Path) -> None:
    for method, options in (
        ("lora", {}),
        ("dora", {}),
        ("lora", dict(init="pissa")),
        ("dora", dict(init="olora")),
    ):
        model = veneer.attach(models.llama(), method, to=["q_proj"], rank=3, **options)
        with pytest.raises(FormatError) as e:
            veneer.save(model, tmp_path / "a")
        assert str(e.value) == (
            "adapter 'default' was not saved:\n- the change is zero at 2 of 2 layers, which have learned"
            " nothing: "
            "model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj\nto go on all the same:"
            " allow=('zero',)"
        )
        assert not (tmp_path / "a").exists()
    veneer.save(model, tmp_path / "a", allow="zero")
    assert manifest(tmp_path / "a")["allow"] == ["zero"]
    assert "learned nothing" in refusal(tmp_path / "a")
    veneer.load(models.llama(), tmp_path / "a", allow="zero")


def test_full_fine_tuning_that_changed_nothing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="the change is zero at 21 of 21 layers"):
        veneer.save(full(size=0), tmp_path)


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
def test_a_small_step_is_a_change(init: str, tmp_path: Path) -> None:
    model = veneer.attach(models.llama(), to=["q_proj"], rank=3, init=init)
    models.randomise(model, size=1e-5)
    veneer.save(model, tmp_path)
    veneer.load(models.llama(), tmp_path)


def test_one_layer_that_learned_nothing(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.deltas["default"].B.zero_()
    with pytest.raises(
        FormatError,
        match=r"zero at 1 of 4 layers, which have learned nothing: model\.layers\.1\.mlp\.down_proj",
    ):
        veneer.save(model, tmp_path)


def test_a_broken_adapter_is_not_saved(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.deltas["default"].A[0, 0] = torch.inf
    with pytest.raises(
        FormatError, match=r"NaN or infinity in 1 of 8 tensors: model\.layers\.0\.mlp\.down_proj\.A"
    ):
        veneer.save(model, tmp_path)
    veneer.save(model, tmp_path, allow=["finite"])
    assert manifest(tmp_path)["no_probe"] == "the outputs are not finite"


def test_an_unknown_adapter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter called 'defautl' is attached; did you mean 'default'"):
        veneer.save(adapted(), tmp_path, "defautl")


class Mine(methods.Delta):
    """A method that is not in the package, and no change of weights."""

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(site.out))

    def delta(self, site: Any) -> Tensor:
        raise NotMergeable("acts on outputs")

    def forward(self, x: Tensor, y: Tensor, site: Any) -> Tensor:
        return self.w * torch.tanh(y)


def test_a_method_that_could_not_be_loaded_again(tmp_path: Path) -> None:
    model = veneer.attach(models.llama(), Mine, to=["q_proj"])
    with pytest.raises(
        FormatError,
        match="test_store: PEFT cannot express this method, and Veneer finds methods by file when loading",
    ):
        veneer.save(model, tmp_path)


# Narrower files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("lora", dict(init="pissa")), ("dora", {})])
def test_a_narrower_file(dtype: torch.dtype, method: str, options: dict[str, Any], tmp_path: Path) -> None:
    ours = adapted(method, **options)
    veneer.save(ours, tmp_path, dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / TENSORS).values()} == {dtype}
    again = models.output(veneer.load(models.llama(), tmp_path))
    scale = float(models.output(ours).abs().max())
    torch.testing.assert_close(again, models.output(ours), rtol=0, atol=8 * torch.finfo(dtype).eps * scale)


def test_a_file_too_narrow(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.deltas["default"].B.mul_(1e-8)
    with pytest.raises(FormatError) as e:
        veneer.save(model, tmp_path, dtype=torch.float16)
    assert (
        "in torch.float16 these changes would lose more than 5% of themselves: model.layers.0.mlp.down_proj ("
        in str(e.value)
    )
    veneer.save(model, tmp_path, dtype=torch.bfloat16)
    with pytest.raises(
        ConfigError,
        match=r"adapters are saved in torch\.float32, torch\.bfloat16, torch\.float16, not in torch\.int8",
    ):
        veneer.save(model, tmp_path, dtype=torch.int8)


def test_a_narrower_file_in_our_own_layout(tmp_path: Path) -> None:
    ours = full()
    veneer.save(ours, tmp_path, dtype=torch.bfloat16)
    again = models.output(veneer.load(models.llama(), tmp_path))
    torch.testing.assert_close(again, models.output(ours), rtol=0, atol=0.05)


# Whole or not at all


@pytest.mark.parametrize("where", ["write_tensors", "write_json", "sha256", "sync"])
def test_a_failed_save_leaves_the_old_adapter(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    veneer.save(adapted(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, where, fail)
    with pytest.raises(OSError, match="No space left"):
        veneer.save(adapted("dora"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_save_cut_off_between_two_names_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    veneer.save(adapted(), tmp_path)
    rename, done = os.replace, []

    def once(a: Any, b: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(rename(a, b))

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        veneer.save(adapted(seed=2), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS, MANIFEST]
    assert "it was changed, or a save was cut off" in refusal(tmp_path)


# The base


@pytest.mark.parametrize("build", [models.llama, models.gpt2])
def test_the_fingerprint_does_not_depend_on_the_dtype(build: Any) -> None:
    record = fingerprint.measure(build())
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert fingerprint.differences(build().to(dtype), record) == []
        assert fingerprint.differences(build(), fingerprint.measure(build().to(dtype))) == []
        assert (
            fingerprint.differences(build().to(torch.bfloat16), fingerprint.measure(build().to(dtype))) == []
        )
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fine_tuned_base_is_another(dtype: torch.dtype) -> None:
    record = fingerprint.measure(models.llama())
    tuned = models.llama()
    with torch.no_grad():
        for layer in tuned.model.layers:
            layer.self_attn.v_proj.weight.add_(
                0.002 * torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
            )
    (text,) = fingerprint.differences(tuned.to(dtype), record)
    assert text == (
        "another base: 2 of 21 weights have other values: model.layers.0.self_attn.v_proj.weight,"
        " model.layers.1.self_attn.v_proj.weight"
    )


def test_adapters_are_no_part_of_the_base() -> None:
    record = fingerprint.measure(models.llama())
    assert fingerprint.measure(adapted()) == record
    assert not [
        n for n in fingerprint.measure(models.gpt2(tie_word_embeddings=True))["tensors"] if "lm_head" in n
    ]


def test_large_weights_are_sampled_evenly() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(100, 1000))

    model, record = Large(), fingerprint.measure(Large())
    assert record["tensors"]["w"]["shape"] == [100, 1000] and len(record["tensors"]["w"]["sample"]) == 32
    for row in (0, 50, 99):
        changed = copy.deepcopy(model)
        changed.w.data[row] = 1
        assert fingerprint.differences(changed, record)


# The disk


def test_what_is_written_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    handles: set[int] = set()
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        done.append(os.fstat(handle).st_ino)
        handles.add(handle)
        fsync(handle)

    def named(old: Path, new: Path) -> None:
        done.append(new.name)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", named)
    with files.replacing(tmp_path / "a", tmp_path / "b") as temporary:
        for t in temporary:
            t.write_text("some")
        assert done == []
    a, b, folder = (p.stat().st_ino for p in (tmp_path / "a", tmp_path / "b", tmp_path))
    assert done == [a, b, "a", "b", folder]
    done.clear()
    with files.making(tmp_path / "new") as place:
        (place / "c").write_text("some")
    assert done == [p.stat().st_ino for p in (tmp_path / "new" / "c", tmp_path / "new", tmp_path)]
    assert len(handles) == 1  # each was closed before the next was opened, and so has its number


# The probe


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [models.llama, models.gpt2, models.bert])
def test_the_probe_holds_in_other_dtypes(build: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = veneer.attach(build(), rank=3)
    models.randomise(model, size=0.05)
    veneer.save(model, tmp_path)
    assert manifest(tmp_path)["probe"]["dtype"] == "float32"
    veneer.load(build().to(dtype), tmp_path)


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [
        (torch.float64, 1.5e-7),
        (torch.float32, 3e-6 + 5e-7 * 2**0.5),
        (torch.float16, 2.5e-3 + 7.5e-4 * 2**0.5),
        (torch.bfloat16, 2e-2 + 6e-3 * 2**0.5),
    ],
)
@pytest.mark.parametrize("which", ["off", "both"])
def test_the_probe_allows_rounding_and_no_more(
    dtype: torch.dtype, allowed: float, which: str, tmp_path: Path
) -> None:
    """allowed: of the outputs' norm in a model of two blocks; both: the effect is the one that was kept."""
    ours = adapted(build=lambda: models.llama().to(dtype))
    veneer.save(ours, tmp_path)
    probe = manifest(tmp_path)["probe"]
    norm = max(float(torch.tensor(probe[k]).norm()) for k in ("off", "on"))
    trusted = math.ceil(0.75 * len(probe["off"]))  # the others may flip by rounding alone
    moved = ["off", "on"] if which == "both" else ["off"]
    for share, fine in ((0.9, True), (1.1, False)):
        added = share * allowed * norm / trusted**0.5
        values = {k: [v + added for v in probe[k]] for k in moved}
        edit(tmp_path / MANIFEST, probe={**probe, **values})
        if fine:
            veneer.load(models.llama().to(dtype), tmp_path)
        else:
            told = "- probe: with the adapter off, outputs are "
            assert told in refusal(tmp_path, models.llama().to(dtype))


def test_the_probe_is_taken_with_the_adapter_alone_and_in_evaluation_mode(tmp_path: Path) -> None:
    model = adapted(dropout=0.5)
    veneer.attach(model, name="other", to=["v_proj"], rank=2)
    models.randomise(model, "other")
    model.train()
    model.model.layers[0].eval()
    veneer.save(model, tmp_path)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert veneer.active(model) == {"default": 1.0, "other": 1.0}
    veneer.load(models.llama().train(), tmp_path)


def test_outputs_of_another_base_or_another_adapter(tmp_path: Path) -> None:
    veneer.save(adapted(), tmp_path)
    kept = manifest(tmp_path)["probe"]
    edit(tmp_path / MANIFEST, probe={**kept, "off": [y + 1 for y in kept["off"]]})
    assert "- probe: with the adapter off, outputs are 14 from those kept with it; " in refusal(tmp_path)
    edit(tmp_path / MANIFEST, probe={**kept, "shape": [1, 16, 98]})
    assert (
        "- probe: the model's output is (1, 16, 97), it was (1, 16, 98) when the adapter was saved"
        in refusal(tmp_path)
    )


def test_a_model_without_token_ids_needs_inputs_for_a_probe(tmp_path: Path) -> None:
    model = adapted(build=models.conv_net, to=["first", "line"])
    veneer.save(model, tmp_path)
    assert manifest(tmp_path)["probe"] is None
    assert (
        manifest(tmp_path)["no_probe"]
        == "the model does not take token ids; pass probe= with the keyword arguments of a call"
    )
    veneer.load(models.conv_net(), tmp_path)
    veneer.save(model, tmp_path, probe=models.inputs(model))
    veneer.load(models.conv_net(), tmp_path)
    veneer.load(models.conv_net().to(torch.bfloat16), tmp_path)
    edit(tmp_path / CONFIG, lora_alpha=7)
    assert "probe: with the adapter on" in refusal(tmp_path, models.conv_net(), allow="norm")


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (
            {"x": torch.zeros(1 << 16, 2)},
            "probe input 'x': must hold at most 65536 real numbers, got 131072; give a smaller one",
        ),
        ({"x": [1]}, "probe input 'x': must be a tensor, number, text or None, got a list"),
    ],
)
def test_inputs_that_cannot_be_kept(inputs: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        veneer.save(adapted(build=models.conv_net, to=["first"]), tmp_path, probe=inputs)
    assert not list(tmp_path.iterdir())


class Odd(nn.Module):
    """Outputs of other kinds."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.answer = nn.Linear(4, 4), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.layer(x))


@pytest.mark.parametrize("answer", [lambda y: (y, 1), lambda y: {"scores": y, "n": 1}])
def test_the_probe_takes_the_first_tensor_of_an_output(answer: Any, tmp_path: Path) -> None:
    model = adapted(build=lambda: Odd(answer), to=["layer"])
    veneer.save(model, tmp_path, probe={"x": torch.ones(2, 4)})
    assert manifest(tmp_path)["probe"]["shape"] == [2, 4]
    veneer.load(Odd(answer), tmp_path)


def test_an_output_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"probe: the model must return a tensor, or something with \.logits, got a str"
    ):
        veneer.save(adapted(build=lambda: Odd(str), to=["layer"]), tmp_path, probe={"x": torch.ones(2, 4)})


def test_a_model_that_fails_on_bare_token_ids(tmp_path: Path) -> None:
    model = adapted()
    model.forward = lambda input_ids, pixels: None  # type: ignore[method-assign]
    veneer.save(model, tmp_path)
    assert manifest(tmp_path)["no_probe"].startswith(
        "the model fails on bare token ids (TypeError); pass probe= with the keyword"
    )


def test_an_encoder_and_decoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    def build() -> nn.Module:
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0
        )
        return T5ForConditionalGeneration(config).eval()

    model = adapted(build=build, to=["q", "wo"])
    veneer.save(model, tmp_path)
    assert manifest(tmp_path)["probe"]["shape"] == [1, 16, 50]
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == "SEQ_2_SEQ_LM"
    veneer.load(build(), tmp_path)


def test_every_word_to_allow_is_used_somewhere() -> None:
    source = "".join(p.read_text() for p in Path(store.__file__).parents[1].rglob("*.py"))
    from veneer.adapt.store.problems import ALLOW

    assert [w for w in ALLOW if f'Problem("{w}"' not in source] == []
    assert hooks.BASE in ALLOW


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tensors", {}),
        ("base", {}),
        ("base", None),
        ("sites", []),
        ("probe", {"inputs": {}}),
        ("probe", None),
    ],
)
def test_a_manifest_with_damaged_entries_is_refused(key, value, tmp_path):
    model = veneer.attach(models.llama(), "lora", rank=2)
    with torch.no_grad():
        for _, delta in attached.changes(model, "default"):
            delta.B.add_(0.1)
    veneer.save(model, tmp_path / "a")
    file = tmp_path / "a" / "veneer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, key: value, "no_probe": None}))
    with pytest.raises(FormatError, match=rf"veneer\.json is damaged at .*{key}"):
        veneer.load(models.llama(), tmp_path / "a")
