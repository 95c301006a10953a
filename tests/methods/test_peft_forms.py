"""Every method's form in PEFT, layer by layer: settings, tensors, what is read back, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.cells import built
from support.peft_forms import FORMS, IN, OUT
from torch import nn

from veneer import methods
from veneer.adapt.peft.settings import table
from veneer.errors import FormatError, VeneerError
from veneer.methods import Delta, PeftForm, PeftKind
from veneer.sites import Site, site_for

every = pytest.mark.parametrize("name", FORMS)
SEEDED = {methods.get(n) for n in ("vera", "randlora", "fourierft")}
RANDOM = {"seed", "init"}  # which say how the numbers were drawn
ROUNDED = {"vera_lambda_d", "fourierft_spectrum"}  # which a file holds multiplied


def formed(name: str) -> tuple[Site, Any, PeftForm]:
    own = FORMS[name]
    torch.manual_seed(1)
    site, delta = built(own.method, own.layer(), own.options)
    form = delta.to_peft(site)
    assert form is not None
    return site, delta, form


def read(name: str, site: Site, form: PeftForm, **settings: Any) -> Delta:
    """The change that the form's file holds; tensors that all layers share are wider in it."""
    reader = methods.get(FORMS[name].reader or FORMS[name].method)
    assert issubclass(reader, PeftKind)
    wider = {n: nn.functional.pad(t, (0, 2) * t.ndim, value=9.0) for n, t in form.shared.items()}
    if "randlora_A" in wider:
        wider["randlora_A"] = wider["randlora_A"][:, :1]
    return reader.from_peft(
        site, {**table(reader).every, **form.config, **settings}, {**form.tensors, **wider}
    )


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert set(found) == set(wanted)
    for k, v in wanted.items():
        assert found[k] == (pytest.approx(v, rel=1e-14) if type(v) is float else v), k


@every
def test_settings_and_tensors_of_a_file(name):
    _, delta, form = formed(name)
    assert_same(form.config, FORMS[name].config)
    expected = FORMS[name].tensors(delta)
    assert set(form.tensors) == set(expected)
    for n, t in expected.items():
        found = form.tensors[n]
        assert not found.requires_grad and found.shape == t.shape
        torch.testing.assert_close(found, t.detach(), rtol=1e-6 if n in ROUNDED else 0, atol=0)


@every
def test_a_file_gives_the_same_change_and_options(name):
    site, delta, form = formed(name)
    again = read(name, site, form)
    torch.testing.assert_close(again.delta(site), delta.delta(site), rtol=1e-5, atol=1e-5)
    assert again.dropout == delta.dropout == FORMS[name].options.get("dropout", 0.0)
    known = methods.options_of(type(again))
    wanted = {k: v for k, v in FORMS[name].options.items() if k in known and k not in RANDOM}
    if "seed" in again.options:  # of draws that the file does not need
        assert again.options["seed"] == (FORMS[name].options["seed"] if type(again) in SEEDED else 0)
    if name == "ia3 of outputs":
        wanted = {"feedforward": form.config["feedforward_modules"]}
    if name == "fourierft by rms":
        wanted = {"frequencies": 7, "scaling": form.config["own_scaling"]}
    assert_same({k: again.options[k] for k in wanted}, wanted)


@every
def test_a_change_owns_its_numbers(name):
    site, _, form = formed(name)
    parts = ({n: t.clone() for n, t in own.items()} for own in (form.tensors, form.shared))
    given = PeftForm(form.config, *parts)
    delta = read(name, site, given)
    before = {n: t.clone() for n, t in delta.state_dict().items()}
    for t in (*given.tensors.values(), *given.shared.values()):
        t.zero_()
    assert all(torch.equal(t, before[n]) for n, t in delta.state_dict().items())


@every
def test_every_tensor_is_needed_and_of_one_shape(name):
    site, _, form = formed(name)
    for n in (n for n in form.tensors if n != "fourierft_indices"):
        rest = {k: t for k, t in form.tensors.items() if k != n}
        with pytest.raises(FormatError, match=f"missing: layer.{n}"):
            read(name, site, form._replace(tensors=rest))
        for dim in range(form.tensors[n].ndim):
            longer = torch.cat([form.tensors[n], form.tensors[n].narrow(dim, 0, 1)], dim)
            with pytest.raises(VeneerError):
                read(name, site, form._replace(tensors={**rest, n: longer}))


@every
def test_a_tensor_of_other_dimensions_is_refused(name):
    site, _, form = formed(name)
    for n, t in ((n, t) for n, t in form.tensors.items() if n != "fourierft_indices"):
        for other in (t.flatten()[0], t[None], t[0], t[:0]):
            with pytest.raises(FormatError, match=r"layer\."):
                read(name, site, form._replace(tensors={**form.tensors, n: other}))


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_the_core_of_a_convolution_is_read_and_checked(method):
    """t (r, r, 3, 2), a (r, out), b (r, in): the pair is a' (out, r) and sum_j t_ij b_j (r, in 3 2)."""
    site = site_for("layer", nn.Conv2d(4, OUT, (3, 2)))
    kind, draw = methods.get(method), torch.Generator().manual_seed(0)
    rows, columns = (OUT, 4) if method == "loha" else (4, 2)
    cores = ("hada_t1 hada_w1_a hada_w1_b", "hada_t2 hada_w2_a hada_w2_b", "lokr_t2 lokr_w2_a lokr_w2_b")
    tensors, products = {"lokr_w1": torch.randn(2, 2, generator=draw)}, []
    for names in (n.split() for n in cores if n[:4] == {"loha": "hada", "lokr": "lokr"}[method]):
        t, a, b = (torch.randn(1, *s, generator=draw) for s in ((1, 3, 2), (rows,), (columns,)))
        tensors |= zip(names, (t, a, b), strict=True)
        products.append(a[0][:, None] * (t[0, 0].flatten() * b[0][:, None]).flatten())
    config = {**table(kind).every, "r": 1, "alpha": 3, "decompose_factor": 2}
    if method == "loha":
        tensors.pop("lokr_w1")
        expected = 3 * products[0] * products[1]
    else:
        expected = 3 * torch.kron(tensors["lokr_w1"], products[0])
    torch.testing.assert_close(kind.from_peft(site, config, dict(tensors)).delta(site), expected)
    for n, wrong in itertools.product(tensors, (None, torch.ones(()), torch.ones(2, 2, 2), torch.ones(0, 0))):
        given = {**tensors, n: wrong}
        if wrong is None:
            del given[n]
        if n in ("hada_t1", "hada_t2", "lokr_t2") and wrong is None:
            continue  # then a and b are a pair of a wrong shape
        with pytest.raises(FormatError, match=f"layer.{n}"):
            kind.from_peft(site, config, given)


@pytest.mark.parametrize("name", ["vera", "randlora"])
def test_shared_factors_may_be_wider_and_not_narrower(name):
    site, _, form = formed(name)
    reader = methods.get(name)
    config = {**table(reader).every, **form.config}
    assert len(form.shared) == 2
    with pytest.raises(FormatError, match="missing: layer"):
        reader.from_peft(site, config, dict(form.shared))
    other = {n: 2 * t for n, t in form.shared.items()}  # as another machine might have drawn them
    delta = reader.from_peft(site, config, {**form.tensors, **other})
    shapes = {"vera": ((5, IN), (OUT, 5)), "randlora": ((5, 1, OUT), (IN, 2, 5))}[name]
    for part, shape in zip("AB", shapes, strict=True):
        assert other[f"{name}_{part}"].shape == shape
        assert torch.equal(delta.get_buffer(part).flatten(), other[f"{name}_{part}"].flatten())
    for n, t in form.shared.items():
        for dim in (d for d in range(t.ndim) if t.shape[d] > 1):
            given = {**form.tensors, **form.shared, n: t.narrow(dim, 0, t.shape[dim] - 1)}
            with pytest.raises(FormatError, match=f"wrong shape: layer.{n}"):
                reader.from_peft(site, config, given)
        with pytest.raises(FormatError, match=f"{name}_A and {name}_B are missing in the file"):
            reader.from_peft(site, config, {**form.tensors, n: t})


def test_removed_triplets_of_adalora_are_zeros_in_the_file():
    site, delta, _ = formed("adalora")
    A, B, E = delta.A.detach(), delta.B.detach(), delta.E.detach()
    delta.cut(torch.tensor([3, 1]))
    config, tensors, _ = form = delta.to_peft(site)
    assert config == {**FORMS["adalora"].config, "kept": 2}
    assert torch.equal(tensors["lora_A"], torch.cat([A[[3, 1]], torch.zeros(2, IN)]))
    assert torch.equal(tensors["lora_B"], torch.cat([B[:, [3, 1]], torch.zeros(OUT, 2)], 1))
    assert torch.equal(tensors["lora_E"], torch.cat([E[[3, 1]], torch.zeros(2, 1)]))
    again = read("adalora", site, form)
    assert len(again.E) == 2 and torch.equal(again.delta(site), delta.delta(site))


def test_a_target_above_the_rank_of_a_file_of_adalora_is_the_rank():
    site, _, form = formed("adalora")
    assert read("adalora", site, form, target_r=9).options["target"] == 4
    assert read("adalora", site, form, target_r=1).options["target"] == 1
    with pytest.raises(FormatError, match=r"wrong shape: layer.lora_E is \(4,\)"):
        flat = {**form.tensors, "lora_E": form.tensors["lora_E"][:, 0]}
        read("adalora", site, form._replace(tensors=flat))


def test_randlora_fills_the_room_of_the_widest_layers():
    sites = [site_for("0", nn.Linear(6, 10)), site_for("1", nn.Linear(9, 4)), site_for("2", nn.Linear(2, 3))]
    kind = methods.get("randlora")
    assert kind.peft_room(sites, {"r": 4}) == {"randlora_A": (4, 1, 9), "randlora_B": (10, 3, 4)}
    assert kind.peft_room(sites, {"r": 3}) == {"randlora_A": (3, 1, 9), "randlora_B": (10, 3, 3)}


def test_frequencies_that_a_file_lacks_are_drawn_from_its_seed():
    site, delta, form = formed("fourierft")
    bare = form._replace(tensors={"fourierft_spectrum": form.tensors["fourierft_spectrum"]})
    assert torch.equal(read("fourierft", site, bare).delta(site), delta.delta(site))
    without = read("fourierft", site, bare, random_loc_seed=None)
    drawn = torch.randperm(OUT * IN, generator=torch.Generator().manual_seed(777))[:7]
    assert torch.equal(without.rows * IN + without.columns, drawn)


@pytest.mark.parametrize("eps", [0.05, 50.0])
def test_constrained_rotations_are_shortened_to_their_bound(eps):
    """PEFT bounds the norm of a whole Q, both triangles, by eps / sqrt(number of blocks)."""
    site, delta, form = formed("oft")
    Q, bound = delta.Q.detach(), eps / 3**0.5
    norms = (2 * Q.square().sum(1, keepdim=True)).sqrt()
    expected = torch.where(norms > bound, Q * bound / norms, Q)
    assert (eps > 1) == bool((norms < bound).all())
    torch.testing.assert_close(read("oft", site, form, coft=True, eps=eps).Q.detach(), expected)
    assert torch.equal(read("oft", site, form, coft=False, eps=eps).Q.detach(), Q)


@pytest.mark.parametrize(
    ("version", "fits"),
    [("0.17.9", False), ("0.18.0", True), ("0.19.0.dev0", True), ("1.2", True), (None, False)],
)
def test_the_series_of_oft_is_that_of_peft_0_18(version, fits):
    site, delta, form = formed("oft")
    if fits:
        assert torch.equal(read("oft", site, form, peft_version=version).delta(site), delta.delta(site))
    else:
        with pytest.raises(FormatError, match=r"PEFT before 0\.18 summed another series"):
            read("oft", site, form, peft_version=version)
    site, delta, form = formed("oft shared and exact")
    assert torch.equal(
        read("oft shared and exact", site, form, peft_version=version).delta(site), delta.delta(site)
    )


def test_settings_of_ia3_may_be_a_list_or_none():
    site, _, form = formed("ia3 of inputs")
    assert read("ia3 of inputs", site, form, feedforward_modules=["z", "layer"]).options == {
        "feedforward": ("layer", "z")
    }
    outputs = form._replace(tensors={"ia3_l": torch.ones(OUT, 1)})
    assert not read("ia3 of inputs", site, outputs, feedforward_modules=None).reads


def test_orthogonal_columns_of_hra_are_those_of_gram_and_schmidt():
    site, U = (
        site_for("layer", nn.Linear(3, 3).double()),
        torch.tensor([[-2.0, 5.0], [0.0, 0.0], [0.0, -3.0]]),
    )
    config = {**table(methods.get("hra")).every, "peft_type": "HRA", "r": 2}
    for gs, second in ((False, [5.0, 0.0, -3.0]), (True, [0.0, 0.0, 1.0])):
        H = torch.eye(3).double()
        for u in (torch.tensor([1.0, 0.0, 0.0]).double(), torch.tensor(second).double()):
            H = H @ (torch.eye(3) - 2 * u[:, None] * u / (u @ u))
        delta = methods.get("hra").from_peft(site, {**config, "apply_GS": gs}, {"hra_u": U.double()})
        torch.testing.assert_close(delta.delta(site), site.weight() @ H - site.weight())
