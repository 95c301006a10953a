"""The chunked loss: equal to the plain one in value and in every gradient, for every kind of head, and
small."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.models import VOCABULARY, gpt2, llama, randomise
from torch import nn

import veneer
from veneer.errors import SiteError
from veneer.ops import chunked
from veneer.ops.chunked import blocked, cross_entropy, whole
from veneer.tasks.text import next_token
from veneer.tasks.text.head import cut

TOLERANCE = 1e-5


def relative(a, b):
    return float(
        (a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp_min(1e-30)
    )


@pytest.mark.parametrize("kernel", [blocked, whole])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_gradient_is_that_of_cross_entropy(kernel, smoothing, dtype, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 3 * 11)  # several blocks, the last one shorter
    monkeypatch.setattr(chunked, "ROWS", 3 * 11)
    logits = (5 * torch.randn(8, 11)).to(dtype).requires_grad_()
    labels = torch.randint(0, 11, (8,))
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.cross_entropy(logits.to(wide), labels, reduction="sum", label_smoothing=smoothing)
    expected.backward()
    loss, gradient, factor = kernel(logits.detach().clone(), labels, smoothing)
    assert loss.dtype == wide and gradient.dtype == dtype
    gradient = gradient if factor is None else factor * gradient
    assert relative(loss, expected) < 10 * torch.finfo(wide).eps
    assert relative(gradient, logits.grad) < 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("head", [nn.Identity(), nn.Sequential(nn.Linear(9, 9), nn.Tanh()), nn.Linear(9, 9)])
def test_logits_that_somebody_reads_again_are_not_written_over(head):
    """Logits that are the features themselves, and logits kept by tanh for its backward."""
    features, labels = torch.randn(7, 9, requires_grad=True), torch.arange(7)
    before = features.detach().clone()
    loss = cross_entropy(features, labels, head, list(head.parameters()), chunk=3, kernel=whole)
    with torch.no_grad():
        assert relative(cross_entropy(features, labels, head, chunk=3, kernel=whole), loss) < TOLERANCE
    assert torch.equal(features, before)
    leaves = [features, *head.parameters()]
    expected = torch.autograd.grad(F.cross_entropy(head(features), labels, reduction="sum"), leaves)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert relative(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("n", [0, 1, 4, 10])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kernel", [blocked, whole])
def test_any_number_of_positions_and_a_trained_head(smoothing, n, trained, kernel):
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(n, 6, generator=draw, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 9, (n,), generator=draw)
    head = nn.Linear(6, 9).double().requires_grad_(trained)

    def act(loss):
        for p in (features, *head.parameters()):
            p.grad = None
        (0.3 * loss).backward()
        return [loss.detach(), *(p.grad for p in (features, *head.parameters()))]

    plain = act(F.cross_entropy(head(features), labels, reduction="sum", label_smoothing=smoothing))
    parameters = [p for p in head.parameters() if p.requires_grad]
    ours = act(cross_entropy(features, labels, head, parameters, smoothing=smoothing, chunk=4, kernel=kernel))
    for a, b in zip(ours, plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(
            cross_entropy(features, labels, head, smoothing=smoothing, chunk=4), plain[0]
        )


def test_a_second_derivative_is_refused_clearly():
    features = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(features, torch.tensor([0, 1, 2]), nn.Linear(4, 5))
    with pytest.raises(
        RuntimeError, match=r"derivatives of second order \(create_graph=True\) are not supported"
    ):
        torch.autograd.grad(loss, features, create_graph=True)


def test_the_logits_never_exist_as_a_whole():
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    features = torch.randn(40, 3, requires_grad=True)
    head = nn.Linear(3, 50).requires_grad_(False)
    with Largest():
        cross_entropy(features, torch.zeros(40, dtype=torch.long), head, chunk=8).backward()
    assert largest == 8 * 50


def scaled(**config):
    """A model and the setting that changes its logits, as transformers' own class computes them."""
    import transformers

    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, pad_token_id=0)
    kind, settings = config.pop("kind"), config
    settings_class, model_class = (getattr(transformers, f"{kind}{end}") for end in ("Config", "ForCausalLM"))
    torch.manual_seed(0)
    return model_class(settings_class(**sizes, **settings))


def tied():
    return llama(tie_word_embeddings=True).requires_grad_(True)


def adapted_head():
    model = veneer.attach(llama(), "lora", rank=2, to=["lm_head", "q_proj"])
    randomise(model)
    return model


def adapted_dora_head():
    model = veneer.attach(llama(), "dora", rank=2, to=["lm_head"])
    randomise(model)
    return model


MODELS = {
    "frozen head": lambda: veneer.attach(llama(), "lora", rank=2),
    "trained": lambda: llama().requires_grad_(True),
    "tied and trained": tied,
    "adapted head": adapted_head,
    "head with DoRA": adapted_dora_head,
    "GPT-2": lambda: gpt2().requires_grad_(True),
    "Gemma 2": lambda: scaled(kind="Gemma2", final_logit_softcapping=2.0, head_dim=8),
    "Granite": lambda: scaled(kind="Granite", logits_scaling=3.0),
    "Cohere": lambda: scaled(kind="Cohere", logit_scale=0.3),
}


def batch(ignored=True):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (3, 9), generator=draw)
    labels = torch.randint(0, VOCABULARY, (3, 9), generator=draw)
    if ignored:
        labels[torch.rand(3, 9, generator=draw) < 0.4] = next_token.IGNORED
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_every_gradient_equal_the_plain_path(name, smoothing, monkeypatch):
    monkeypatch.setattr(next_token, "cross_entropy", lambda *a, **k: cross_entropy(*a, **k, chunk=5))
    model = MODELS[name]().float().eval()
    results = []
    for chunked_ in (False, True):
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no falling back
            loss, n = next_token.loss(model, batch(), chunked=chunked_, smoothing=smoothing)
        (loss / n).backward()
        results.append(
            (loss.detach(), n, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
        )
    (plain, n, gradients), (ours, m, own) = results
    assert n == m and relative(ours, plain) <= TOLERANCE
    assert own.keys() == gradients.keys() and gradients
    for k, g in gradients.items():
        assert relative(own[k], g) <= TOLERANCE, k


def test_the_head_runs_on_labelled_positions_only():
    model, rows = llama(), []
    model.lm_head.register_forward_hook(lambda m, args, y: rows.append(y.numel() // VOCABULARY))
    next_token.loss(model, batch())  # with the check
    rows.clear()
    _, n = next_token.loss(model, batch())
    assert rows == [n] and n < 27


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_half_precision_is_as_close_as_the_plain_path(precision):
    model = llama().requires_grad_(True)
    exact = copy.deepcopy(model).double()
    reference, _ = next_token.loss(exact, batch(), chunked=False)
    reference.backward()
    errors = []
    for chunked_ in (False, True):
        other = copy.deepcopy(model).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss, _ = next_token.loss(other, batch(), chunked=chunked_)
        loss.backward()
        errors.append(relative(other.lm_head.weight.grad, exact.lm_head.weight.grad))
        assert relative(loss, reference) < 0.01
    assert errors[1] <= 2 * errors[0] + 1e-3


class Odd(nn.Module):
    """A model that does to its logits what no configuration says."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.base_model = inner, inner.config, inner.base_model

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, **inputs):
        out = self.inner(**inputs)
        out.logits = out.logits * torch.linspace(0.9, 1.1, VOCABULARY)
        return out


def test_a_head_that_does_more_is_noticed_and_said():
    model = Odd(llama())
    with pytest.warns(
        UserWarning,
        match=r"Odd: output layer .* do not give its logits \(relative difference 0\.0\d\); the loss",
    ):
        loss, _ = next_token.loss(model, batch())
    plain, _ = next_token.loss(model, batch(), chunked=False)
    assert torch.equal(loss, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next_token.loss(model, batch())  # said once


def test_wrapped_and_other_models_take_the_plain_path():
    model = llama()
    assert cut(model) is not None and cut(nn.Linear(2, 2)) is None
    model.register_forward_pre_hook(lambda m, args: None)  # sharding gathers the model's own parameters there
    assert cut(model) is None


def test_the_check_leaves_modes_alone_and_finds_layers_never_called():
    model = llama(attention_dropout=0.5).train()
    model.lm_head.eval()
    next_token.loss(model, batch())
    assert model.model.training and not model.lm_head.training
    idle = llama()
    idle.model.spare = nn.Linear(4, 4)
    veneer.attach(idle, "lora", rank=2, to=["q_proj", "spare"])
    with pytest.raises(SiteError, match=r"never called in the first training step: model\.spare"):
        next_token.loss(idle, batch())
