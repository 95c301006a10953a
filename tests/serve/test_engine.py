"""Parts of the engine by themselves: lanes, kept beginnings, text, draws, turns, places."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from support import served, tiny

from veneer.adapt.banks.segments import SegmentBank
from veneer.serve.adapters import expression, reading
from veneer.serve.adapters.slots import Slots
from veneer.serve.adapters.version import Version
from veneer.serve.engine import prefixes, sampler
from veneer.serve.engine.request import Sampling
from veneer.serve.engine.steps import lanes
from veneer.serve.engine.steps.lanes import Lane, Pair, Strip
from veneer.serve.engine.text import Detokeniser
from veneer.serve.engine.waiting import Waiting
from veneer.serve.errors import RequestError


def test_rows_of_a_lane_keep_their_content_as_others_come_and_go():
    draw, lane, kept = random.Random(0), Lane(64), {}
    for step in range(300):
        if kept and draw.random() < 0.45:
            lane.leave(owner := draw.choice(list(kept)))
            del kept[owner]
        else:
            n = draw.randrange(1, 60)
            content = [Pair(*(torch.randn(1, 2, n, 3) for _ in "KV")) for _ in range(2)]
            lane.enter(step, n, content.__getitem__, [0, 1])
            kept[step] = n, content
        assert len(lane.owners) == len(kept)
        for owner, (n, content) in kept.items():
            for layer in (0, 1):
                for got, own in zip(lane.row(owner)(layer), content[layer], strict=True):
                    assert torch.equal(got[:, :, :n], own) and not got[:, :, n:].any()
    for owner in list(kept):
        lane.leave(owner)
    assert lane.bytes == 0


def test_a_row_that_left_leaves_no_nan_behind():
    lane, sick = Lane(64), Pair(*(torch.full((1, 1, 9, 2), torch.nan) for _ in "KV"))
    lane.enter("well", 5, lambda layer: Pair(torch.ones(1, 1, 5, 2), torch.ones(1, 1, 5, 2)), [0])
    lane.enter("sick", 9, lambda layer: sick, [0])
    lane.leave("sick")
    assert all(t.isfinite().all() for t in lane.layers[0])


@pytest.mark.parametrize("window", [None, 3])
def test_masks_show_each_token_its_own_past(window):
    like = torch.empty(0)
    mask = lanes.decode_mask([2, 5, 4], window, like)
    far = 9 if window is None else window
    assert mask[:, 0, 0].tolist() == [[n - far <= i < n for i in range(5)] for n in (2, 5, 4)]
    assert lanes.decode_mask([3, 3], 3, like) is None
    chunk = lanes.chunk_mask(4, 3, window, like)
    assert chunk.tolist() == [[q - far < k <= q for k in range(7)] for q in (4, 5, 6)]
    assert lanes.chunk_mask(0, 3, 3, like) is None


def test_kept_beginnings_are_found_by_adapters_tenant_and_every_token_before():
    cache, tokens = prefixes.Prefixes(1 << 20), list(range(100))
    pairs = {0: Pair(torch.arange(100.0).view(1, 1, 100, 1), -torch.arange(100.0).view(1, 1, 100, 1))}
    own = prefixes.namespace([("h1", 1.0), ("h2", 0.5)], "t")
    cache.add(own, tokens, pairs.__getitem__, [0])

    def found(namespace, tokens):
        strip = Strip(200)
        n = cache.take(namespace, tokens, strip)
        if n:
            assert torch.equal(strip.layers[0].K[0, 0, :n, 0], torch.arange(float(n)))
        return n

    assert found(prefixes.namespace([("h2", 0.5), ("h1", 1.0)], "t"), tokens) == 96
    assert found(own, tokens[:96]) == 64  # one token at least is computed, for its logits
    assert found(own, [*tokens[:40], 7, *tokens[41:]]) == 32
    others = [
        ([("h1", 1.0)], "t"),
        ([("h1", 1.0), ("h2", 0.25)], "t"),
        ([("h1", 1.0), ("h2", 0.5)], "u"),
        ([], "t"),
    ]
    assert [found(prefixes.namespace(*o), tokens) for o in others] == [0, 0, 0, 0]


def test_kept_beginnings_stay_within_their_limit():
    one = prefixes._bytes({0: Pair(torch.zeros(1, 32, 4), torch.zeros(1, 32, 4))})
    cache = prefixes.Prefixes(3 * one)
    pair = Pair(torch.zeros(1, 1, 64, 4), torch.zeros(1, 1, 64, 4))
    for i in range(5):
        cache.add(prefixes.namespace([(str(i), 1.0)]), list(range(64)), lambda layer: pair, [0])
        assert cache.bytes == one * len(cache.blocks) <= cache.limit
    cache.forget({prefixes.namespace([("4", 1.0)])})
    assert not any(n == prefixes.namespace([("4", 1.0)]) for n, _ in cache.blocks.values())


TEXT = "naïve café — ✓ 🙂🙂 the cat\n\n sat"


@pytest.mark.parametrize("stop", [(), ("the cat",), ("✓ 🙂",), ("absent",), ("t\n", "cat")])
def test_text_comes_in_whole_characters_up_to_a_stop(stop):
    tokenizer = tiny.tokenizer()
    made, parts = Detokeniser(tokenizer, stop), []
    for token in tokenizer(TEXT)["input_ids"]:
        parts.append(made.add(token))
        if made.stopped:
            break
    parts.append(made.finish())
    ends = [at for s in stop if (at := TEXT.find(s)) >= 0]
    assert "".join(parts) == TEXT[: min(ends, default=len(TEXT))]
    assert made.stopped == bool(ends) and "�" not in "".join(parts)


def test_an_unfinished_character_is_shown_at_the_end():
    tokenizer = tiny.tokenizer()
    tokens = tokenizer("🙂")["input_ids"][:-1]
    made = Detokeniser(tokenizer)
    assert [made.add(t) for t in tokens] == [""] * len(tokens)
    assert made.finish() == tokenizer.decode(tokens)


@pytest.mark.parametrize(
    "given",
    [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 4, "top_p": 0.8}, {"temperature": 0.5}],
)
def test_draws_follow_the_distribution_and_its_bounds(given):
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0])
    s = Sampling(**given)
    p = torch.softmax(logits / s.temperature, 0)
    if s.top_k:
        p[p < p.topk(s.top_k).values[-1]] = 0
        p /= p.sum()
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    p[order[before >= s.top_p]] = 0
    p[p < s.min_p * p.max()] = 0
    p /= p.sum()
    n = 4000
    rows = [sampler.Draws(s, [], seed) for seed in range(n)]
    counts = Counter(c.token for c in sampler.choose(logits.repeat(n, 1), rows))
    for token in range(6):
        share = counts[token] / n
        assert abs(share - float(p[token])) < 4 * (0.25 / n) ** 0.5
        assert p[token] > 0 or not counts[token]


def test_many_tokens_are_bounded_exactly_too():
    logits = torch.zeros(5000)
    rows = [sampler.Draws(Sampling(top_p=0.9), [], seed) for seed in range(200)]
    tokens = [c.token for c in sampler.choose(logits.repeat(200, 1), rows)]
    assert (
        len(set(tokens)) > 150
    )  # equal shares: 4500 tokens are within the bound, more than are looked at first


def test_penalties_and_biases_change_the_choice():
    logits = torch.tensor([[3.0, 2.5, -1.0, 0.0]])

    def choice(prompt=(), taken=(), **given):
        draws = sampler.Draws(Sampling(temperature=0, **given), prompt, 0)
        for t in taken:
            draws.took(t)
        return sampler.choose(logits.clone(), [draws])[0].token

    assert choice() == 0
    assert choice(logit_bias={3: 10.0}) == 3 and choice(logit_bias={0: -100.0}) == 1
    assert choice(taken=[0], presence_penalty=1.0) == 1 and choice(taken=[1], presence_penalty=1.0) == 0
    assert choice(taken=[0, 0], frequency_penalty=0.3) == 1 and choice(taken=[0], frequency_penalty=0.3) == 0
    assert choice(prompt=[0], repetition_penalty=2.0) == 1


def test_rows_that_are_not_finite_have_no_choice():
    logits = torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [torch.inf, 0.0]])
    rows = [sampler.Draws(Sampling(logprobs=1), [], i) for i in range(3)]
    assert [c.token is None for c in sampler.choose(logits, rows)] == [False, True, True]


def test_flows_take_turns_by_the_tokens_that_each_was_served():
    waiting, order = Waiting(), []
    for i in range(6):
        waiting.add("busy", f"b{i}", set())
    waiting.charge("busy", 1000)
    for i in range(6):
        waiting.add("new", f"n{i}", {"busy"})
    while len(waiting):
        flow, item = next(waiting.heads())
        waiting.remove(flow, item)
        waiting.charge(flow, 50)
        order.append(item)
    # The new flow gets no credit for the time before it came, and no delay either.
    assert [len({"b", "n"} & {item[0] for item in order[i : i + 2]}) for i in range(0, 12, 2)] == [2] * 6
    assert [item for item in order if item[0] == "b"] == [f"b{i}" for i in range(6)]
    waiting.forget(set())
    assert waiting.served == {}


def versions(n):
    model = served.model()
    import veneer
    from veneer.adapt.banks.entries import entries

    veneer.attach(model, "lora", rank=2, name="x")
    served.randomise(model, "x")
    forms = entries(model, {"x": "x"})["x"].forms
    veneer.detach(model)
    return SegmentBank(model), [Version(f"v{i}", str(i), forms, None) for i in range(n)]


def test_places_are_given_to_the_idle_longest_and_never_from_under_a_request():
    bank, (a, b, c, d) = versions(4)
    slots = Slots(bank, 2)
    for v in (a, b):
        assert slots.acquire(((v, 1.0),))
    assert slots.acquire(((c, 1.0),)) is None and c.placed is None
    slots.release(((a, 1.0),))
    assert slots.acquire(((c, 1.0),)) and a.placed is None and b.placed is not None
    assert slots.acquire(((b, 1.0), (d, 1.0))) is None and b.running == 1
    slots.release(((c, 1.0),))
    assert slots.acquire(((b, 0.5), (d, 1.0))) and c.placed is None
    slots.retire(b)
    assert b.placed is not None
    slots.release(((b, 1.0),))
    slots.release(((b, 0.5), (d, 1.0)))
    assert b.placed is None and d.placed is not None
    d.pinned = True
    assert slots.acquire(((a, 1.0), (c, 1.0))) is None
    assert slots.acquire(((a, 1.0),)) and slots.acquire(((c, 1.0),)) is None
    slots.drain([c])
    assert a.draining and slots.acquire(((a, 1.0),)) is None
    slots.release(((a, 1.0),))
    assert slots.acquire(((c, 1.0),)) and not a.draining


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", ()),
        ("base", ()),
        ("a", (("a", 1.0),)),
        ("a@0.5", (("a", 0.5),)),
        ("a@-.5+b@+2", (("a", -0.5), ("b", 2.0))),
        ("a+a@0.5+base@0.3", (("a", 1.5),)),
        ("a@1+a@-1", ()),
        ("odd@name", (("odd@name", 1.0),)),
        ("unknown", (("unknown", 1.0),)),
    ],
)
def test_expressions_are_sums(text, named):
    assert expression.parse(text, ["a", "b", "odd@name"], "base") == named


@pytest.mark.parametrize(
    "text", ["a@", "@1", "a++b", "a@x", "a@1e3", "a@nan", "a b@1", "a+" * 9 + "a@9", "+".join("abcdefghij")]
)
def test_other_texts_are_no_expressions(text):
    with pytest.raises(RequestError) as caught:
        expression.parse(text, ["a", "b"], "base")
    assert caught.value.code == "invalid_mixture" and caught.value.param == "model"


def test_files_of_strangers_are_checked_before_they_are_read(tmp_path, folders):
    from veneer.errors import FormatError

    def broken(name, content, match, most=1 << 20):
        folder = tmp_path / f"f{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(FormatError, match=match):
            reading.check_files(folder, tmp_path, most)

    broken("adapter_config.json", b"[" * 40 + b"]" * 40, "nested at most 32 deep, got 40")
    broken("adapter_model.safetensors", (1 << 40).to_bytes(8, "little"), "header of at most")
    broken("adapter_model.safetensors", (100).to_bytes(8, "little") + b"{}", "cut off")
    broken("adapter_model.safetensors", (4).to_bytes(8, "little") + b"abcd" * 9, "no readable header")
    broken("adapter_model.safetensors", b"\0" * 2000, "at most 1000 bytes, got 2000", most=1000)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "adapter_config.json").symlink_to(folders / "french" / "adapter_config.json")
    with pytest.raises(FormatError, match="must lie under the adapters' root"):
        reading.check_files(linked, tmp_path, 1 << 20)
    (linked / "veneer.json").symlink_to(tmp_path / "nowhere")
    (linked / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match="must be a plain file"):
        reading.check_files(linked, tmp_path, 1 << 20)
    deep = '{"a": "' + "[" * 100 + '"}'
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "veneer.json").write_text(deep)
    reading.check_files(tmp_path / "text", tmp_path, 1 << 20)
