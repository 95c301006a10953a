"""The bank: one batch, many adapters, each row as if its adapter acted alone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from support.models import conv_net, llama, randomise
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.banks.bank import Bank
from veneer.errors import ConfigError, FormatError, NotMergeable, ShapeError, SiteError

MIXTURE = {
    "pissa": ("lora", {"rank": 2, "init": "pissa"}),
    "dora": ("dora", {"rank": 3, "to": ["q_proj", "up_proj"]}),
    "miss": ("miss", {"rank": 4, "to": ["down_proj", "v_proj"]}),
    "loldu": ("loldu", {"rank": 2, "basis": "svd"}),
    "ia3": ("ia3", {}),
    "flora": ("flora", {"to": ["q_proj", "o_proj"]}),
    "grid": ("fourierft", {"frequencies": 3, "grid": True, "rms": 0.3}),
    "products": ("flora", {"rank": 3, "to": ["q_proj", "v_proj", "down_proj"]}),
}


def mixed(model=None, names=tuple(MIXTURE)):
    """A model with adapters of many methods and ranks, in float64."""
    model = (llama() if model is None else model).double()
    for seed, name in enumerate(names):
        method, options = MIXTURE[name]
        veneer.attach(model, method, name=name, **options)
        randomise(model, name, seed=seed, size=0.2)
    return model


def tokens(rows, seed=0):
    return torch.randint(0, 97, (rows, 6), generator=torch.Generator().manual_seed(seed))


def one_by_one(model, names, ids):
    """Logits of each row with its adapter alone."""
    rows = []
    for name, row in zip(names, ids, strict=True):
        with veneer.using(model, *([name] if name else [])):
            rows.append(model(input_ids=row[None]).logits)
    return torch.cat(rows).detach()


ROWS = ["dora", None, "ia3", "pissa", "flora", "grid", "products", "loldu", "miss", "dora"]


def test_a_mixture_of_methods_and_ranks_is_each_of_them_on_its_rows():
    model, ids = mixed(), tokens(len(ROWS))
    expected = one_by_one(model, ROWS, ids)
    bank = veneer.bank(model, MIXTURE.keys())
    assert bank.names == {"base": 0, **{name: i for i, name in enumerate(MIXTURE, 1)}}
    bank.use(ROWS)
    torch.testing.assert_close(model(input_ids=ids).logits.detach(), expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():  # other ways, which write in place
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-9, atol=1e-9)
        bank.ids.copy_(bank.ids.flip(0))
        flipped = model(input_ids=ids.flip(0)).logits
    torch.testing.assert_close(flipped, expected.flip(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("trainable", [False, True])
def test_gains_leave_biases_as_they_are(trainable):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), Conv1D(4, 6)).double()
    nn.init.normal_(model[2].bias)
    for name in ("dora", "flora"):
        veneer.attach(model, name, name=name, rank={"dora": 2, "flora": 1}[name])
        randomise(model, name, size=0.3)
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = []
    for name, row in zip(("flora", "dora", None), x, strict=True):
        with veneer.using(model, *([name] if name else [])):
            expected.append(model(row[None]))
    veneer.bank(model, ["dora", "flora"], trainable=trainable).use(["flora", "dora", None])
    torch.testing.assert_close(model(x), torch.cat(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trainable", [False, True])
def test_gains_of_inputs_act_beside_adapters_without(trainable):
    model, ids, rows = mixed(names=("ia3", "pissa")), tokens(3), ["pissa", "ia3", None]
    expected = one_by_one(model, rows, ids)
    veneer.bank(model, ["ia3", "pissa"], trainable=trainable).use(rows)
    torch.testing.assert_close(model(input_ids=ids).logits.detach(), expected, rtol=1e-9, atol=1e-9)


def test_the_base_stays_bit_for_bit_under_slot_0():
    model, ids = mixed(names=("pissa", "dora")), tokens(3)
    with veneer.using(model):
        base = model(input_ids=ids).logits
    bank = veneer.bank(model, ["pissa", "dora"])
    assert bank.ids.shape == () and torch.equal(
        model(input_ids=ids).logits, base
    )  # at the start all rows have the base
    bank.use([None, "dora", 0])
    # Rows are compared with the rows at the same places of the same batch: elsewhere a product may round
    # differently.
    assert torch.equal(model(input_ids=ids).logits[[0, 2]], base[[0, 2]])
    with veneer.using(model):
        assert torch.equal(model(input_ids=ids).logits, base)
    veneer.detach(model, "bank")
    assert veneer.adapters(model) == ["pissa", "dora"]


def test_one_id_for_all_rows_or_one_for_each_token():
    model, ids = mixed(names=("pissa", "dora")), tokens(2)
    expected = {name: one_by_one(model, [name, name], ids) for name in ("dora", None)}
    bank = veneer.bank(model, ["pissa", "dora"])
    for all_rows, name in (("dora", "dora"), (None, None), (2, "dora"), (0, None)):
        bank.use(all_rows)
        torch.testing.assert_close(model(input_ids=ids).logits.detach(), expected[name], rtol=1e-9, atol=1e-9)
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 3, 32, dtype=torch.float64)
    bank.use(["pissa", None, "dora"])
    by_row = layer(x.transpose(0, 1)).transpose(0, 1)
    bank.router.ids = torch.tensor([[1, 0, 2], [1, 0, 2]])
    torch.testing.assert_close(layer(x), by_row, rtol=1e-12, atol=1e-12)


def test_every_row_generates_what_it_generates_alone():
    model, ids, rows = mixed(names=("pissa", "dora", "ia3")), tokens(4), ["ia3", None, "pissa", "dora"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = []
    for name, row in zip(rows, ids, strict=True):
        with veneer.using(model, *([name] if name else [])):
            expected.append(model.generate(row[None], **settings))
    veneer.bank(model, ["pissa", "dora", "ia3"]).use(rows)
    assert torch.equal(model.generate(ids, **settings), torch.cat(expected))


@pytest.mark.parametrize("trainable", [False, True])
def test_it_serves_a_quantised_base(trainable):
    model, ids = veneer.quantise(llama()), tokens(2)
    for name in ("one", "two"):
        veneer.attach(model, "lora", rank=2, name=name)
        randomise(model, name, seed=len(name))
    expected = one_by_one(model, ["two", "one"], ids)
    veneer.bank(model, ["one", "two"], trainable=trainable).use(["two", "one"])
    torch.testing.assert_close(model(input_ids=ids).logits.detach(), expected, rtol=1e-4, atol=1e-4)


def test_copies_pickles_and_moves_have_ids_of_their_own_that_all_layers_share():
    model, ids = mixed(names=("pissa", "dora")), tokens(2)
    bank = veneer.bank(model, ["pissa", "dora"]).use(["pissa", "dora"])
    y = model(input_ids=ids).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        own = veneer.bank(twin)
        own.ids.copy_(torch.tensor([2, 1]))
        torch.testing.assert_close(twin(input_ids=ids.flip(0)).logits, y.flip(0), rtol=1e-9, atol=1e-9)
        assert torch.equal(model(input_ids=ids).logits, y) and bank.ids.tolist() == [1, 2]
    model.to("meta")
    routers = {id(layer.router) for layer in bank.layers.values()}
    assert len(routers) == 1 and bank.ids.is_meta


def test_stacks_keep_the_dtype_of_the_layer():
    model = veneer.attach(llama().bfloat16(), "lora", rank=2)
    bank = veneer.bank(model, ["default"])
    model.to("cpu", torch.bfloat16)
    assert {t.dtype for layer in bank.layers.values() for t in (layer.A, layer.B)} == {torch.bfloat16}
    assert bank.ids.dtype == torch.long


def test_slots_are_written_and_emptied_while_others_serve(tmp_path):
    model = mixed()
    ids, rows = tokens(3), ["dora", "pissa", None]
    expected = one_by_one(model, rows, ids)
    veneer.save(model, tmp_path / "dora", "dora")
    veneer.detach(model, *(set(MIXTURE) - {"pissa"}))
    bank = veneer.bank(model, ["pissa"], slots=2, rank=4, gains=True, to="all-linear")
    assert bank.write("french", tmp_path / "dora") == 2
    assert veneer.adapters(model) == ["pissa", "bank"] and veneer.active(model) == {"bank": 1.0}
    bank.use(["french", "pissa", None])
    torch.testing.assert_close(
        model(input_ids=ids).logits.detach(), expected, rtol=1e-5, atol=1e-5
    )  # saved in float32
    with pytest.raises(
        ConfigError, match=r"rows of the bank have adapter 'french' now; give them another one with use\(\)"
    ):
        bank.evict("french")
    bank.use([None, "pissa", None]).evict("french")
    assert bank.names == {"base": 0, "pissa": 1}
    assert bank.write("again", "pissa") == 2
    bank.use([None, "again", None])
    torch.testing.assert_close(model(input_ids=ids).logits[1:].detach(), expected[1:], rtol=1e-9, atol=1e-9)


def compilations(model, ids):
    """The compiled model, and a list that grows with every compilation."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    return torch.compile(model, fullgraph=True, backend=backend), compiled


@pytest.mark.parametrize("trainable", [False, True])
def test_one_compilation_serves_all_ids_and_slots(trainable):
    model, ids = mixed(names=("pissa", "dora", "ia3")), tokens(3)
    rows = ["pissa", "dora", None]
    expected = one_by_one(model, rows, ids)
    if trainable:
        bank = veneer.bank(model, ["pissa", "dora", "ia3"], trainable=True)
    else:
        bank = veneer.bank(model, ["pissa"], slots=3, rank=4, gains=True, to="all-linear")
    bank.use([None, "pissa", None])
    run, made = compilations(model, ids)
    with torch.no_grad():
        run(input_ids=ids)
        assert len(made) == 1
        if not trainable:
            bank.write("dora")
            bank.write("ia3")
        for order in ([0, 1, 2], [2, 1, 0], [1, 1, 0]):
            bank.use([rows[i] for i in order])
            torch.testing.assert_close(
                run(input_ids=ids[order]).logits, expected[order], rtol=1e-9, atol=1e-9
            )
        if not trainable:
            bank.evict("ia3")
            bank.write("third", "dora")
            bank.use(["third", "pissa", "dora"])
            run(input_ids=ids)
    assert len(made) == 1


def test_a_bad_adapter_touches_only_its_own_rows():
    model, ids = mixed(names=("pissa", "dora", "ia3")), tokens(4)
    expected = one_by_one(model, ["pissa", "dora", "dora", None], ids)
    with torch.no_grad():  # in down_proj, as attention may hide it
        changes(model, "ia3")[-1][1].l[3] = float("nan")
        changes(model, "pissa")[-1][1].A[0, 0] = float("inf")
    bank = veneer.bank(model, ["dora", "ia3", "pissa"])
    assert not bank.router.finite
    bank.use(["ia3", "dora", "pissa", None])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = model(input_ids=ids).logits.detach()
        assert not y[[0, 2]].isfinite().all(-1).any()
        torch.testing.assert_close(y[[1, 3]], expected[[1, 3]], rtol=1e-9, atol=1e-9)
    bank.use(None)
    bank.evict("ia3")
    assert not bank.router.finite
    bank.evict("pissa")
    assert bank.router.finite


def separate(names, rows):
    """The gradient of each adapter's parameters, on a model of its own and its own rows."""
    found = {}
    for name in names:
        model = mixed(names=names)
        veneer.train_only(model, name)
        with veneer.using(model, name):
            model(input_ids=rows[name]).logits.square().sum().backward()
        found[name] = {
            f"{s.name}.{n}": p.grad for s, d in changes(model, name) for n, p in d.named_parameters()
        }
    return found


@pytest.mark.parametrize(
    "names", [("pissa", "dora", "miss", "loldu"), ("ia3", "flora", "pissa"), ("products", "ia3", "grid")]
)
def test_several_learn_in_one_pass_as_if_each_were_alone(names):
    rows = {name: tokens(2, seed) for seed, name in enumerate(names)}
    expected = separate(names, rows)
    model = mixed(names=names)
    bank = veneer.bank(model, names, trainable=True)
    assert {
        n.split("deltas.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad
    } == set(names)
    order = [0, 3, 1, 2, *range(4, 2 * len(names))]  # rows of one adapter need not be neighbours
    bank.use([name for name in names for _ in range(2)][i] for i in order)
    model.train()
    model(input_ids=torch.cat(list(rows.values()))[order]).logits.square().sum().backward()
    for name in names:
        for site, delta in changes(model, name):
            for n, p in delta.named_parameters():
                torch.testing.assert_close(p.grad, expected[name][f"{site.name}.{n}"], rtol=1e-9, atol=1e-9)
    assert all(p.grad is None for n, p in model.named_parameters() if "deltas" not in n)


@pytest.mark.parametrize(
    "rows", [["pissa", "dora", "dora", "products"], ["dora", "pissa", "products", "dora"]]
)
def test_an_adapter_that_is_not_finite_spoils_no_other_ones_learning(rows):
    names, found = ("pissa", "dora", "products"), []
    for spoiled in (False, True):
        model = mixed(names=names)
        if spoiled:
            with torch.no_grad():
                next(
                    d for s, d in changes(model, "pissa") if s.name == "model.layers.0.mlp.down_proj"
                ).A.fill_(float("nan"))
        veneer.bank(model, names, trainable=True).use(rows)
        losses = model(input_ids=tokens(4)).logits.square().sum((1, 2))
        losses.sum().backward()
        found.append([p.grad for n in names[1:] for _, d in changes(model, n) for p in d.parameters()])
    assert losses.isnan().tolist() == [row == "pissa" for row in rows]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_an_adapter_that_no_row_has_gets_a_gradient_of_zero():
    model = mixed(names=("pissa", "dora"))
    veneer.bank(model, ["pissa", "dora"], trainable=True).use(["pissa", "pissa"])
    model(input_ids=tokens(2)).logits.sum().backward()
    assert not any(
        p.grad.any() for _, d in changes(model, "dora") for p in d.parameters() if p.grad is not None
    )


def test_beside_another_adapter_it_is_the_sum_of_both():
    model, ids = mixed(names=("pissa", "dora", "loldu")), tokens(2)
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 3, 32, dtype=torch.float64)
    with veneer.using(model):
        base = layer(x)
    alone = {}
    for name in ("pissa", "dora", "loldu"):
        with veneer.using(model, name):
            alone[name] = layer(x) - base
    veneer.bank(model, ["pissa", "dora"]).use(["pissa", "dora"])
    with veneer.using(model, {"bank": 0.5}, "loldu"):
        expected = base + 0.5 * torch.stack([alone["pissa"][0], alone["dora"][1]]) + alone["loldu"]
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
        model(input_ids=ids)


# What is refused, and how it is said.


def refusal(call, error=ConfigError):
    with pytest.raises(error) as e:
        call()
    return str(e.value)


def test_methods_without_a_normal_form_are_refused_by_name_all_at_once():
    model = mixed(names=("pissa",))
    veneer.attach(model, "bat", rank=2, name="tiles", to=["q_proj"])
    veneer.attach(model, "fourierft", frequencies=9, name="waves", to=["q_proj", "k_proj"])
    veneer.attach(model, "lora", rank=2, name="words", to=["embed_tokens", "v_proj"])
    before = veneer.active(model)
    text = refusal(lambda: veneer.bank(model, ["tiles", "pissa", "waves", "words"]))
    q0, q1 = (f"model.layers.{i}.self_attn.q_proj" for i in range(2))
    assert text.splitlines()[0] == (
        f"'tiles': bat has no normal form at {q0}, {q1}; use it alone, or make it a LoRA with veneer.to_lora"
    )
    assert text.splitlines()[1].startswith(
        "'waves': fourierft has no normal form at model.layers.0.self_attn."
    )
    assert text.splitlines()[2] == (
        "'words' changes model.embed_tokens of kind 'embedding'; a bank serves linear layers: leave these out"
    )
    assert (
        len(text.splitlines()) == 3
        and veneer.active(model) == before
        and "bank" not in veneer.adapters(model)
    )
    assert "pissa" not in text


def test_convolutions_are_refused():
    model = veneer.attach(conv_net(), "lora", rank=2, to=["first"])
    assert "of kind 'conv'; a bank serves linear layers" in refusal(lambda: veneer.bank(model, ["default"]))


def test_unknown_adapters_and_ids_are_refused_with_the_nearest():
    model = mixed(names=("pissa", "dora"))
    text = refusal(lambda: veneer.bank(model, {"a": "pisa", "b": "/nowhere"}))
    assert text.splitlines() == [
        "'a': 'pisa' is neither an attached adapter nor a folder; did you mean 'pissa'?",
        "'b': '/nowhere' is neither an attached adapter nor a folder; known: dora, pissa",
    ]
    assert "did you mean 'pissa'?" in refusal(lambda: veneer.bank(model, ["pisa"], trainable=True))
    bank = veneer.bank(model, ["pissa", "dora"])
    text = refusal(lambda: bank.use(["dorra", 7, "dora", -1]))
    assert text.splitlines() == [
        "the bank has no adapter 'dorra'; did you mean 'dora'?",
        "the bank has no adapter 7; known: 0 base, 1 pissa, 2 dora",
        "the bank has no adapter -1; known: 0 base, 1 pissa, 2 dora",
    ]
    assert refusal(lambda: bank.evict("x")) == "the bank has no adapter 'x' to evict; known: dora, pissa"
    assert refusal(lambda: bank.evict("base")).startswith("the bank has no adapter 'base' to evict")


def test_ids_of_another_batch_are_refused():
    model = mixed(names=("pissa",))
    veneer.bank(model, ["pissa"]).use(["pissa", None])
    assert refusal(lambda: model(input_ids=tokens(3)), ShapeError) == (
        "the bank has ids of shape (2,) and 'model.layers.0.self_attn.q_proj' was called with (3, 6, 32);"
        " name an adapter for"
        " every row of this batch with use([..]), or one for all of them with use(name)"
    )


def test_what_a_bank_has_no_room_for_is_refused():
    model = mixed(names=("pissa", "loldu", "ia3", "products"))
    veneer.attach(model, "lora", name="wide", rank=6, to=["down_proj"])
    bank = veneer.bank(model, {"a": "pissa"}, slots=2)
    q = "model.layers.0.mlp.down_proj"
    assert f"{q} (rank 6 > 4)" in refusal(lambda: bank.write("wide"), ShapeError)
    text = refusal(lambda: bank.write("ia3"), ShapeError)
    assert f"{q} (gains of inputs)" in text and "k_proj (gains of outputs)" in text
    assert text.endswith("make it with rank=, gains= or products=")
    assert "(3 products with W > 0, gains of outputs)" in refusal(lambda: bank.write("products"), ShapeError)
    assert refusal(lambda: bank.write("a", "loldu")).startswith(
        "the bank has an adapter 'a' already; evict it first"
    )
    bank.write("loldu")
    assert (
        refusal(lambda: bank.write("b", "pissa"))
        == "all 2 slots of the bank are taken; evict one of a, loldu, or make it with slots="
    )
    narrow = mixed(names=("pissa", "flora"))
    bank = veneer.bank(narrow, ["flora"], slots=2)
    assert "layers that the bank does not serve: model.layers.0.self_attn.k_proj" in refusal(
        lambda: bank.write("pissa"), SiteError
    )


def test_other_mistakes_are_said(tmp_path):
    model = mixed(names=("pissa", "ia3"))
    assert "this model has no bank; make one with veneer.bank" in refusal(lambda: veneer.bank(model))
    assert "would be empty" in refusal(lambda: veneer.bank(model, {}))
    assert "would be empty" in refusal(lambda: veneer.bank(model, {}, trainable=True))
    assert "slots: must be at least 2, the number of adapters, got 1" in refusal(
        lambda: veneer.bank(model, ["pissa", "ia3"], slots=1)
    )
    assert "'base' and '' cannot name adapters of a bank" in refusal(
        lambda: veneer.bank(model, {"base": "pissa"})
    )
    assert "slots, rank, gains, products, to: cannot be set with trainable=True" in refusal(
        lambda: veneer.bank(model, ["pissa"], trainable=True, slots=3)
    )
    veneer.attach(model, "lora", rank=2, dropout=0.1, name="drops")
    assert "'drops' drops inputs (dropout=0.1), which a bank cannot; attach it with dropout=0" in refusal(
        lambda: veneer.bank(model, ["drops"], trainable=True)
    )
    bank = veneer.bank(model, ["pissa", "ia3"], trainable=True)
    assert "has a bank already" in refusal(lambda: veneer.bank(model, ["pissa"], name="second"))
    assert "adapters of a bank that trains stay where they are" in refusal(lambda: bank.write("drops"))
    with veneer.using(model, "bank", "drops"):
        assert "gains of inputs at 'model.layers.0.mlp.down_proj'" in refusal(
            lambda: model(input_ids=tokens(2))
        )
    veneer.detach(model, "drops", "pissa", "ia3")
    assert "a bank holds many adapters" in refusal(lambda: veneer.merge(model, "bank"), NotMergeable)
    text = refusal(lambda: veneer.save(model, tmp_path / "bank", "bank"), FormatError)
    assert "it is a bank of several adapters; save each of them under its own name" in text
    assert not (tmp_path / "bank").exists()


def test_a_bank_is_found_on_the_model_it_was_made_for():
    model = mixed(names=("pissa",))
    made = veneer.bank(model, ["pissa"]).use("pissa")
    assert isinstance(made, Bank) and veneer.bank(model).ids is made.ids
    assert isinstance(model, nn.Module)
