"""The bank in segment layout: every row as if its sum of adapters acted alone, and nothing left after an
adapter has gone.
"""

from __future__ import annotations

import pytest
import torch
from support.gains import Gains
from support.models import llama, randomise
from torch import nn

import veneer
from veneer.adapt import attached
from veneer.adapt.banks import entries
from veneer.adapt.banks.segments import SegmentBank
from veneer.errors import ConfigError, ShapeError

MIXTURE = {
    "pissa": ("lora", {"rank": 2, "init": "pissa"}),
    "twin": ("lora", {"rank": 2}),
    "wide": ("lora", {"rank": 5, "to": ["q_proj", "up_proj", "lm_head"]}),
    "dora": ("dora", {"rank": 3, "to": ["q_proj", "up_proj"]}),
    "miss": ("miss", {"rank": 4, "to": ["down_proj", "v_proj"]}),
    "ia3": ("ia3", {}),
    "flora": ("flora", {"to": ["q_proj", "o_proj"]}),
    "products": ("flora", {"rank": 3, "to": ["q_proj", "v_proj", "down_proj"]}),
    "second_dora": ("dora", {"rank": 4, "to": ["q_proj", "up_proj"]}),  # gains beside those of the first
    "second_ia3": ("ia3", {}),
    "all_parts": (Gains, {"to": ["q_proj", "down_proj", "lm_head"]}),
}


def served():
    """A float64 model with the mixture attached, the same as places in a bank, and the model without adapters
    again.
    """
    model = llama(tie_word_embeddings=False).double()
    for seed, (name, (method, options)) in enumerate(MIXTURE.items()):
        veneer.attach(model, method, name=name, **options)
        randomise(model, name, seed=seed, size=0.2)
    forms = {n: e.forms for n, e in entries.entries(model, {name: name for name in MIXTURE}).items()}
    return model, forms


def alone(model, terms, ids):
    with torch.no_grad(), veneer.using(model, dict(terms)):
        return model(input_ids=ids[None]).logits[0]


SUMS = [
    {"pissa": 1.0},
    {"twin": 1.0},
    {"wide": 1.0},
    {},
    {"dora": 1.0},
    {"dora": 0.5},
    {"ia3": 1.0},
    {"ia3": -0.5},
    {"flora": 1.0},
    {"products": 1.0},
    {"products": 0.3},
    {"pissa": 0.75, "wide": -1.5},
    {"dora": 0.5, "ia3": 1.0, "twin": 2.0},
    {"flora": 1.0, "products": 0.5, "miss": 1.0},
    {"miss": 1.0},
    {"second_dora": 1.0},
    {"second_ia3": 1.0},
    {"all_parts": 1.0},
    {"all_parts": 0.5},
    {"all_parts": -1.0, "twin": 1.0, "dora": 0.5},
]


def ids(n, seed):
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengths", [[4] * len(SUMS), list(range(1, len(SUMS) + 1))])
def test_packed_rows_are_each_their_own_sum(lengths):
    model, forms = served()
    texts = [ids(n, i) for i, n in enumerate(lengths)]
    expected = [alone(model, terms, text) for terms, text in zip(SUMS, texts, strict=True)]
    names = list(MIXTURE)
    veneer.activate(model)
    bank = SegmentBank(model)
    placed = {name: bank.put(forms[name])[0] for name in names}
    rows = [
        (tuple((placed[n], s) for n, s in terms.items()), len(t))
        for terms, t in zip(SUMS, texts, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda i: [p[:2] for p, _ in rows[i][0]])
    bank.use([rows[i] for i in order])
    veneer.activate(model, "bank")
    packed = torch.cat([texts[i] for i in order])[None]
    position = torch.cat([torch.arange(lengths[i]) for i in order])[None]
    owner = torch.cat([torch.full((lengths[i],), k) for k, i in enumerate(order)])
    mask = (owner == owner[:, None]) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    with torch.no_grad():
        got = model(input_ids=packed, position_ids=position, attention_mask=mask[None, None]).logits[0]
    for k, i in enumerate(order):
        torch.testing.assert_close(got[owner == k], expected[i], rtol=1e-9, atol=1e-9)


def test_an_adapter_that_went_leaves_no_trace():
    model, forms = served()
    text = ids(5, 0)
    expected = alone(model, {}, text)
    veneer.detach(model)
    keys = list(model.state_dict())
    bank = SegmentBank(model)
    for _ in range(3):
        placed = [bank.put(forms[n])[0] for n in MIXTURE]
        bank.use([(((placed[0], 1.0),), 5)])
        with torch.no_grad():
            assert not torch.equal(model(input_ids=text[None]).logits[0], expected)
        bank.use([((), 5)])
        with torch.no_grad():
            assert torch.equal(model(input_ids=text[None]).logits[0], expected)
        for p in placed:
            bank.drop(p)
        assert bank.stacks == {}
    bank.close()
    assert list(model.state_dict()) == keys and attached.adapters(model) == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_adapter_with_a_nan_spoils_its_own_rows_only():
    model, forms = served()
    veneer.detach(model)
    bank = SegmentBank(model)
    site, form = forms["twin"]["model.layers.0.self_attn.q_proj"]
    bad = form._replace(factors=form.factors._replace(B=torch.full_like(form.factors.B, torch.nan)))
    good, finite = bank.put(forms["twin"])
    assert finite
    nan, finite = bank.put({site.name: (site, bad)})
    assert not finite and nan[:2] == (good.stack, 1)
    text = torch.cat([ids(3, 0), ids(3, 1)])
    x = torch.randn(1, 6, site.in_, dtype=torch.float64)
    bank.use([(((good, 1.0),), 3), (((nan, 1.0),), 3)])
    y = site.module(x)[0]
    assert y[:3].isfinite().all() and y[3:].isnan().all()
    bank.drop(nan)
    again, finite = bank.put(forms["twin"])
    assert again == nan and finite
    bank.use([(((again, 1.0),), 6)])
    with torch.no_grad():
        assert model(input_ids=text[None]).logits.isfinite().all()


def test_a_sum_leaves_biases_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    for name in ("dora", "flora"):
        veneer.attach(model, name, name=name, rank={"dora": 2, "flora": 1}[name])
        randomise(model, name, size=0.3)
    forms = {n: e.forms for n, e in entries.entries(model, {"dora": "dora", "flora": "flora"}).items()}
    x = torch.randn(3, 7, dtype=torch.float64)
    sums = [{"dora": 1.0}, {"flora": 1.0}, {"dora": -0.5, "flora": 0.25}]
    with torch.no_grad():
        expected = []
        for terms, row in zip(sums, x, strict=True):
            with veneer.using(model, terms):
                expected.append(model(row))
    veneer.detach(model)
    bank = SegmentBank(model)
    placed = {n: bank.put(f)[0] for n, f in forms.items()}
    bank.use([(tuple((placed[n], s) for n, s in terms.items()), 1) for terms in sums])
    torch.testing.assert_close(model(x).detach(), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_wrong_rows_and_company_are_refused():
    model, forms = served()
    veneer.detach(model)
    bank = SegmentBank(model)
    placed, _ = bank.put(forms["pissa"])
    bank.use([(((placed, 1.0),), 5)])
    with pytest.raises(ShapeError, match=r"called with 4 rows, the batch has 5; call use\(\)"):
        model(input_ids=ids(4, 0)[None])
    veneer.attach(model, "lora", name="other")
    veneer.activate(model, "bank", "other")
    with pytest.raises(ConfigError, match=r"acts alone.*activate only 'bank'"):
        model(input_ids=ids(5, 0)[None])
