"""A server in this process: every answer is that of its own sum of adapters alone, whatever else runs beside
it.
"""

from __future__ import annotations

import copy
import functools
import math
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import served, tiny

import veneer
from veneer.errors import ConfigError
from veneer.serve.engine.request import Finished, Tokens
from veneer.serve.errors import BrokenAdapter, Overloaded, RequestError, UnknownModel

SUMS = [
    ("", ()),
    ("french", (("french", 1.0),)),
    ("formal@0.5", (("formal", 0.5),)),
    ("dora", (("dora", 1.0),)),
    ("gains", (("gains", 1.0),)),
    ("flora@-0.5", (("flora", -0.5),)),
    ("french@0.75+formal@-0.3", (("french", 0.75), ("formal", -0.3))),
    ("wide+gains@0.5", (("wide", 1.0), ("gains", 0.5))),
]


def until(condition, seconds=20):
    """Waits for a condition, which must come true."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def wrong(oracle, asked):
    """The answers that differ from the oracle's, of (prompt, terms, tokens)."""
    return [found for p, terms, got in asked if (found := oracle.differs(p, terms, list(got)))]


def test_a_mixed_batch_over_few_slots_answers_like_each_sum_alone(server, oracle):
    asked = [(served.prompt(i, 5 + 9 * i), *SUMS[i % len(SUMS)]) for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda a: server.complete(a[0], a[1], max_tokens=12, temperature=0), asked))
    assert (
        wrong(oracle, [(p, terms, a.tokens) for (p, _, terms), a in zip(asked, answers, strict=True)]) == []
    )
    assert server.engine.slots.evictions > 0 and len(server.engine.slots.placed) <= 3
    assert all(a.prompt_tokens == len(p) for (p, _, _), a in zip(asked, answers, strict=True))


@pytest.mark.parametrize("terms", [{"french": 0.75, "dora": -0.5}, {"gains": 1.0, "flora": 0.25}])
def test_a_sum_answers_like_the_merged_model(server, folders, terms):
    merged = served.model()
    for name in terms:
        veneer.load(merged, folders / name, name)
    veneer.merge(merged, terms)
    ids = torch.tensor([served.prompt(5, 20)])
    with torch.no_grad():
        expected = torch.log_softmax(merged(ids).logits[0].double(), -1)
    chosen = expected[:-1].gather(1, ids[0, 1:, None])[:, 0]
    listed = [{"id": n, "scale": s} for n, s in terms.items()]
    expression = "+".join(f"{n}@{s}" for n, s in terms.items())
    backwards = "+".join(f"{n}@{s}" for n, s in reversed(terms.items()))
    for given in (dict(lora=listed), dict(model=expression), dict(model=backwards)):
        answer = server.complete(ids[0].tolist(), **given, max_tokens=0, prompt_logprobs=True)
        assert math.isnan(answer.prompt_logprobs[0].logprob)
        got = torch.tensor([one.logprob for one in answer.prompt_logprobs[1:]])
        torch.testing.assert_close(got, chosen.float(), rtol=1e-4, atol=1e-4)
    merged.generation_config.eos_token_id = None
    own = merged.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    found = server.complete(ids[0].tolist(), expression, max_tokens=12, temperature=0, ignore_eos=True)
    assert list(found.tokens) == own[0, ids.shape[1] :].tolist()


def test_beginnings_are_reused_for_the_same_adapters_only(folders, oracle):
    with veneer.serve(served.model(), folders, tokenizer=tiny.tokenizer(), watch=0) as server:
        shared, cached = served.prompt(1, 100), {}
        for model, terms in [("french", (("french", 1.0),)), ("formal", (("formal", 1.0),)), ("", ())]:
            for end in (2, 3):
                p = shared + served.prompt(end, 7)
                a = server.complete(p, model, max_tokens=8, temperature=0)
                assert wrong(oracle, [(p, terms, a.tokens)]) == []
                cached[model, end] = a.cached
        assert cached == {(m, e): 96 * (e == 3) for m in ("french", "formal", "") for e in (2, 3)}
        swapped = server.complete(shared + served.prompt(3, 7), "formal@0.5", max_tokens=1)
        assert swapped.cached == 0


def test_a_long_prompt_is_read_in_chunks_beside_answers(folders, oracle):
    with veneer.serve(served.model(), folders, tokenizer=tiny.tokenizer(), watch=0, step_tokens=40) as server:
        long, short = served.prompt(7, 200), served.prompt(8, 4)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(server.complete, short, "french", max_tokens=60, temperature=0)
            second = pool.submit(server.complete, long, "wide", max_tokens=20, temperature=0)
        asked = [
            (short, (("french", 1.0),), first.result().tokens),
            (long, (("wide", 1.0),), second.result().tokens),
        ]
        assert wrong(oracle, asked) == []
        assert server.engine.stats.steps < 100


def test_seeds_decide_draws_whatever_runs_beside(server):
    def ask(seed):
        return server.complete(
            served.prompt(3, 9), "french", max_tokens=10, temperature=0.9, top_p=0.9, seed=seed
        ).tokens

    alone = [ask(s) for s in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, range(6)))
    assert alone == together and len(set(alone)) > 1


def test_logprobs_are_those_of_the_model(server, oracle):
    p = served.prompt(2, 12)
    a = server.complete(p, "dora", max_tokens=5, temperature=0, logprobs=3)
    with torch.no_grad(), veneer.using(oracle.model, "dora"):
        logits = oracle.model(torch.tensor([[*p, *a.tokens]])).logits[0, len(p) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    for one, row in zip(a.logprobs, expected, strict=True):
        assert abs(one.logprob - float(row[one.token])) < 1e-4
        assert [t.token for t in one.top] == row.topk(3).indices.tolist()


def test_a_stop_text_is_cut_off_and_streams_never_show_it(server):
    p = served.prompt(3, 9)
    whole = server.complete(p, "wide", max_tokens=30, temperature=0)
    stop = whole.text[10:13]
    events = list(server.stream(p, "wide", max_tokens=30, temperature=0, stop=(stop,)))
    text = "".join(e.text for e in events if isinstance(e, Tokens))
    assert text == whole.text[: whole.text.index(stop)]
    assert events[-1].reason == "stop" and isinstance(events[-1], Finished)


def test_a_left_stream_is_cancelled(server):
    for _ in server.stream(served.prompt(4, 5), "french", max_tokens=200, temperature=0, ignore_eos=True):
        break
    until(lambda: not server.engine.known)
    assert all(v.is_idle for v in server.engine.slots.placed.values())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (dict(model="frenhc"), UnknownModel, r"model 'frenhc' is unknown; did you mean 'french'\?"),
        (dict(model="french+nothing@2"), UnknownModel, "model 'nothing' is unknown"),
        (dict(model="french@@"), RequestError, "NAME\\[@STRENGTH\\]"),
        (dict(model="french@9"), RequestError, "strengths must be from -4 to 4"),
        (dict(model="formal", lora=[{"id": "french", "scale": 1}]), RequestError, "name different adapters"),
        (dict(lora=[{"id": 99, "scale": 1}]), RequestError, "adapter numbers go from 0 to 5"),
        (dict(prompt=[]), RequestError, "at least one token"),
        (dict(prompt=[5, 10**6]), RequestError, "tokens must be from 0 to \\d+, got 1000000"),
        (dict(prompt=[5] * 250, max_tokens=10), RequestError, "at most 256 tokens together, got 250 and 10"),
        (dict(temperature=-1), RequestError, "temperature must be from 0 to 100, got -1"),
        (dict(stop=("",)), RequestError, "stop must hold texts"),
        (dict(logit_bias={5: 200.0}), RequestError, "logit_bias must be from -100 to 100"),
    ],
)
def test_bad_requests_are_refused_and_the_next_is_answered(server, oracle, given, error, message):
    prompt, model, lora = (
        given.pop("prompt", served.prompt(1, 4)),
        given.pop("model", None),
        given.pop("lora", None),
    )
    with pytest.raises(error, match=message):
        server.complete(prompt, model, lora=lora, **given)
    p = served.prompt(9, 6)
    assert wrong(oracle, [(p, (), server.complete(p, max_tokens=3, temperature=0).tokens)]) == []


def test_a_full_queue_refuses_and_recovers(folders):
    with veneer.serve(
        served.model(), folders, tokenizer=tiny.tokenizer(), watch=0, running=1, queue=2
    ) as server:
        streams = [server.stream(served.prompt(i, 4), max_tokens=200, temperature=0) for i in range(3)]
        next(streams[0])
        next_two = [threading.Thread(target=next, args=(s,)) for s in streams[1:]]
        for t in next_two:
            t.start()
        until(lambda: server.engine.queued == 2)
        with pytest.raises(Overloaded, match="2 requests wait already") as caught:
            server.complete([5], max_tokens=1)
        assert caught.value.retry_after
        streams[0].close()
        for t in next_two:
            t.join(10)
        for s in streams[1:]:
            s.close()
        until(lambda: not server.engine.known)
        assert server.complete([5], max_tokens=1).reason in ("length", "stop")


@pytest.mark.parametrize("least", [10, pytest.param(100, marks=pytest.mark.slow)], ids=["short", "long"])
def test_an_adapter_replaced_under_load_is_old_or_new_and_never_a_mix(tmp_path, least):
    names = {v: served.save(tmp_path, v, seed=s, rank=4) for v, s in (("old", 11), ("new", 12))}
    oracle = served.Oracle(names)
    prompts = [served.prompt(i, 10 + i) for i in range(8)]
    kinds = [("old", 1.0)], [("new", 1.0)]
    right = {p: [oracle.answer(p, tuple(k), 10) for k in kinds] for p in prompts}
    assert all(old != new for old, new in right.values())
    seen = set()
    with veneer.serve(served.model(), {"it": names["old"]}, tokenizer=tiny.tokenizer()) as server:
        done, swaps, draw = threading.Event(), [], random.Random(0)

        def swap():  # at random: in turns, swaps and rounds fell into step, and all rounds met one content
            while not done.is_set():
                server.load("it", names[draw.choice(("old", "new"))], replace=True)
                swaps.append(time.monotonic())

        thread = threading.Thread(target=swap)
        thread.start()
        ask = functools.partial(server.complete, model="it", max_tokens=10, temperature=0)
        try:
            with ThreadPoolExecutor(8) as pool:
                for n in range(200):
                    for p, answer in zip(prompts, pool.map(ask, prompts), strict=True):
                        assert list(answer.tokens) in right[p]
                        seen.add(right[p].index(list(answer.tokens)))
                    if n >= 10 and len(swaps) >= least and seen == {0, 1}:
                        break
        finally:
            done.set()
            thread.join()
        assert len(swaps) >= least and seen == {0, 1}
        until(lambda: len(server.engine.slots.placed) == 1)


def test_unloading_lets_a_stream_end_and_frees_its_place(folders, oracle):
    adapters = {"french": folders / "french", "formal": folders / "formal"}
    with veneer.serve(served.model(), adapters, tokenizer=tiny.tokenizer()) as server:
        p = served.prompt(5, 6)
        events = server.stream(p, "french", max_tokens=60, temperature=0, ignore_eos=True)
        got = list(next(events).tokens)
        server.unload("french")
        with pytest.raises(UnknownModel):
            server.complete(p, "french", max_tokens=1)
        version = next(v for v in server.engine.slots.placed.values() if v.name == "french")
        assert version.running == 1
        for e in events:
            got += e.tokens if isinstance(e, Tokens) else ()
        assert wrong(oracle, [(p, (("french", 1.0),), got)]) == []
        until(lambda: version.placed is None)
        assert server.adapters() == ["formal"]


def test_a_folder_that_cannot_be_served_changes_nothing(server, tmp_path, folders):
    bad = tmp_path / "bad"
    bad.mkdir()
    with pytest.raises(BrokenAdapter, match="bad holds no adapter"):
        server.load("bad", bad)
    other = served.models.llama(seed=5, vocab_size=320, max_position_embeddings=256, hidden_size=48)
    veneer.attach(other, "lora", rank=2)
    served.randomise(other)
    veneer.save(other, tmp_path / "other")
    with pytest.raises(BrokenAdapter, match="must lie under the adapters' root"):
        server.load("other", tmp_path / "other")
    shutil.copytree(tmp_path / "other", folders / ".other")
    with pytest.raises(BrokenAdapter, match="another base"):
        server.load("other", folders / ".other")
    shutil.rmtree(folders / ".other")
    assert server.adapters() == sorted(served.ADAPTERS)
    with pytest.raises(BrokenAdapter) as caught:
        server.load("bad", bad)
    assert str(tmp_path) not in str(caught.value)


def test_a_failed_step_ends_its_requests_and_the_next_are_answered(folders, oracle):
    with veneer.serve(served.model(), folders, tokenizer=tiny.tokenizer(), watch=0) as server:
        server.complete([5, 6], "french", max_tokens=2)
        step, calls = server.engine.runner.step, []

        def failing(works, *, decoding):
            calls.append(len(works))
            if len(calls) == 3:
                raise RuntimeError("planted")
            return step(works, decoding=decoding)

        server.engine.runner.step = failing
        with pytest.raises(RequestError, match="the engine stopped") as caught:
            server.complete(served.prompt(1, 5), "french", max_tokens=50, temperature=0, ignore_eos=True)
        assert caught.value.status == 503
        until(lambda: server.supervisor.is_alive)
        p = served.prompt(2, 5)
        a = server.complete(p, "french", max_tokens=8, temperature=0)
        assert wrong(oracle, [(p, (("french", 1.0),), a.tokens)]) == []
        assert server.supervisor.restarts == 1


def test_new_changed_and_removed_folders_are_noticed(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    served.save(root, "one", seed=1, rank=2)
    with veneer.serve(served.model(), root, tokenizer=tiny.tokenizer(), watch=0.05) as server:
        p = served.prompt(1, 8)

        before = server.complete(p, "one", max_tokens=0, prompt_logprobs=True).prompt_logprobs[1].logprob
        served.save(root, "two", seed=2, rank=2)
        until(lambda: server.adapters() == ["one", "two"])
        content = server.registry.entries["one"].version.content
        served.save(root, "one", seed=3, rank=4)
        until(lambda: server.registry.entries["one"].version.content != content)
        after = server.complete(p, "one", max_tokens=0, prompt_logprobs=True).prompt_logprobs[1].logprob
        assert before != after
        for path in (root / "two").iterdir():
            path.unlink()
        until(lambda: server.adapters() == ["one"])


def test_the_model_is_as_it_was_after_closing(folders):
    model = served.model()
    keys, ids = list(model.state_dict()), torch.tensor([served.prompt(1, 9)])
    with torch.no_grad():
        before = model(ids).logits
    with veneer.serve(model, folders, tokenizer=tiny.tokenizer(), watch=0) as server:
        server.complete([5, 6], "gains+dora", max_tokens=2)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert list(model.state_dict()) == keys and veneer.adapters(model) == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    copy.deepcopy(model)


def test_attached_adapters_are_served_too(folders, oracle):
    model = served.model()
    veneer.load(model, folders / "french", "mine")
    with veneer.serve(model, {"mine": "mine"}, tokenizer=tiny.tokenizer()) as server:
        p = served.prompt(4, 7)
        assert (
            wrong(
                oracle,
                [(p, (("french", 1.0),), server.complete(p, "mine", max_tokens=8, temperature=0).tokens)],
            )
            == []
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(slot=3), "serve has no option 'slot'; did you mean 'slots'"),
        (dict(slots=0), "slots must be at least 1, got 0"),
        (dict(engine="fast"), "engine must be 'auto', 'packed' or 'static'"),
        (dict(context=10**6), "context must be at most the model's 256 tokens"),
    ],
)
def test_wrong_options_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        veneer.serve(served.model(), tokenizer=tiny.tokenizer(), **given)
