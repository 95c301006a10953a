"""Text into what a model reads: files, columns, masks, bytes, windows, order. Masks and windows are"
" written out by hand."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import models, tiny

from veneer.data import chat, pack, row_files, split
from veneer.data.chat import Part
from veneer.data.order import order
from veneer.data.pack import IGNORED, Segment
from veneer.data.row_files import Row
from veneer.data.tokens import Tokens, encode
from veneer.errors import ConfigError, DataError
from veneer.tasks.text import checks
from veneer.tasks.text.next_token import loss

LENGTH = 12
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REWRITES = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
)
REFUSES = "{{ raise_exception('roles must alternate') }}"


def refused(path: Path) -> str:
    with pytest.raises(DataError) as e:
        row_files.read_file(path)
    return str(e.value).replace(str(path), "FILE")


# -- files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "FILE: the file is empty"),
        ("a.jsonl", b" \n\n", "FILE: the file is empty"),
        (
            "a.txt",
            b"ab\ncd\xff\n",
            "FILE: not UTF-8 (byte 0xff at offset 5, line 2); convert it, for instance with iconv",
        ),
        (
            "a.xlsx",
            b"PK",
            "FILE: unsupported format .xlsx; convert it to .csv, .parquet, or .jsonl with one JSON object"
            " a line",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "y"\n',
            "FILE line 2: not JSON at column 13 (Expecting ',' delimiter)",
        ),
        ("a.jsonl", b"[1]\n", "FILE row 1: must be a JSON object with columns, got a int"),
        ("a.jsonl", b'[1]\n{"text": "x"}\n', "FILE line 1: must be a JSON object with columns, got a list"),
        (
            "a.jsonl",
            b'{"promt": "x", "id": 1}\n',
            "FILE line 1: columns must be text, prompt and completion, messages, conversations, or"
            " instruction and output, got 'promt', 'id'; did you mean 'prompt'?",
        ),
        (
            "a.jsonl",
            b'{"prompt": "x", "complection": "y"}\n',
            "FILE line 1: column 'completion' is missing, got 'prompt', 'complection'; did you mean"
            " 'complection'?",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "FILE line 2: column 'text' is missing, got 'body'"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": [4]}\n{"text": 3}\n',
            "FILE line 2: 'text' must be text, got [4]\nFILE line 3: 'text' must be text, got 3",
        ),
        (
            "a.jsonl",
            b'{"conversations": [], "messages": []}\n',
            "FILE line 1: the columns must be of one kind of example, got messages, conversations; name"
            " those to use"
            " by columns",
        ),
        (
            "a.jsonl",
            b'{"messages": "hello"}\n',
            "FILE line 1: 'messages' must be a list of messages, got \"hello\"",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user"}]}\n',
            "FILE line 1: message 1: 'content' must be text, got null",
        ),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name) == message


def test_a_missing_file_and_a_folder_are_refused_with_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert refused(tmp_path / "nodes.txt") == "FILE: the file does not exist; did you mean 'notes.txt'?"
    assert refused(tmp_path).startswith(
        "FILE: must be a file, got a folder; name the files in it (notes.txt)"
    )


def test_many_wrong_rows_are_counted_and_all_files_are_named(tmp_path):
    many = tmp_path / "many.jsonl"
    many.write_text('{"text": "x"}\n' + '{"text": 1}\n' * 9)
    with pytest.raises(DataError) as e:
        row_files.read_files([many, tmp_path / "gone.txt"])
    lines = str(e.value).splitlines()
    assert lines[5] == f"and 4 more in {many}" and lines[6].startswith(
        f"{tmp_path / 'gone.txt'}: the file does not exist"
    )


def test_jsonl_is_split_at_newlines_only_and_a_byte_order_mark_is_no_text(tmp_path):
    odd = "one\u2028two\x0bthree"
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"text": odd, "id": 7}, ensure_ascii=False).encode() + b"\r\n\n"
    )
    (row,) = row_files.read_file(tmp_path / "a.jsonl")
    assert row == Row("text", {"text": odd, "id": 7}, f"{tmp_path / 'a.jsonl'} line 1")
    assert row_files.unused([row]) == ["id"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert (
        row_files.read_file(tmp_path / "a.txt")[0].columns["text"] == "a\r\nb"
    )  # bytes are counted: no line end is changed


# -- masks


def learned(row: Row, template: str | None = None, train_on: str = "completion") -> tuple[str, str]:
    """(all of the row's text, what of it is learned), decoded from the tokens."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = template
    found = encode(chat.parts(row, tokenizer, train_on), tokenizer)
    return tokenizer.decode(found.ids), tokenizer.decode(found.ids[found.learned])


TALK = Row("messages", {"messages": [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And <|end|>?"},
    {"role": "assistant", "content": "The end."},
    {"role": "user", "content": "Bye"},
]}, "talk")  # fmt: skip


@pytest.mark.parametrize(
    ("row", "template", "whole", "part"),
    [
        (Row("text", {"text": "a cat"}, ""), None, "<|end|>a cat<|end|>", "a cat<|end|>"),
        (
            Row("pair", {"prompt": "Q: x?\nA:", "completion": " yes"}, ""),
            None,
            "<|end|>Q: x?\nA: yes<|end|>",
            " yes<|end|>",
        ),
        (Row("pair", {"prompt": "", "completion": "yes"}, ""), None, "<|end|>yes<|end|>", "yes<|end|>"),
        (
            TALK,
            None,
            "<|end|>### system\nBe brief.\n\n### user\n2 + 2?\n\n### assistant\n4<|end|>\n\n### user\nAnd"
            " <|end|>?\n\n### assistant\n"
            "The end.<|end|>\n\n### user\nBye",
            "4<|end|>The end.<|end|>",
        ),
        (
            TALK,
            TEMPLATE,
            "<system>Be brief.<|end|><user>2 + 2?<|end|><assistant>4<|end|>"
            "<user>And <|end|>?<|end|><assistant>The end.<|end|><user>Bye<|end|>",
            "4<|end|>The end.<|end|>",
        ),
    ],
)
def test_only_completions_and_assistant_turns_are_learned(row, template, whole, part):
    assert learned(row, template) == (whole, part)
    assert learned(row, template, "all") == (
        whole,
        whole if whole.startswith("<system>") else whole.removeprefix("<|end|>"),
    )


def test_a_template_without_an_end_gets_one():
    bare = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    row = Row("messages", {"messages": TALK.columns["messages"][1:3]}, "")
    assert learned(row, bare) == ("[user] 2 + 2? [assistant] 4 <|end|>", "4 <|end|>")


@pytest.mark.parametrize(("special", "n"), [(True, 3), (False, 2)])
def test_the_name_of_the_end_token_in_a_text_is_read_or_spelt_out(special, n):
    tokenizer = tiny.tokenizer()
    (parts,) = chat.examples(Row("text", {"text": "x <|end|> y"}, ""), tokenizer, "all", special=special)
    found = encode(parts, tokenizer)
    assert found.ids.tolist().count(tokenizer.eos_token_id) == n  # before, after, and between if it is read
    assert tokenizer("<|end|>")["input_ids"] == [tokenizer.eos_token_id]  # the tokenizer itself is as it was


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REFUSES, "talk: the chat template refuses this conversation: roles must alternate"),
        (
            REWRITES,
            "talk: turn 3: the chat template rewrites earlier turns, and nothing shows where this turn"
            " begins;"
            " mark it in the template with {% generation %}, or give it a row of its own",
        ),
    ],
)
def test_a_template_that_does_not_say_what_is_learned_is_refused(template, message):
    with pytest.raises(DataError) as e:
        learned(TALK, template)
    assert str(e.value) == message


def test_a_prompt_that_ends_within_a_token_ends_the_token_there():
    tokenizer = tiny.tokenizer()
    assert len(tokenizer(" cat")["input_ids"]) == 1
    found = encode([Part("the ", False), Part("cat", True), Part(None, True)], tokenizer)
    ids = tokenizer("the ")["input_ids"] + tokenizer("cat")["input_ids"]
    assert found.ids.tolist() == [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    assert tokenizer.decode(found.ids[found.learned]) == "cat<|end|>"


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.eos_token = None
    with pytest.raises(
        DataError, match="the tokenizer has no end-of-text token, so the model could not learn to stop"
    ):
        encode([Part("x", True), Part(None, True)], tokenizer)


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40))
def test_tokens_count_every_byte_of_the_text_once(prompt, completion):
    found = encode([Part(prompt, False), Part(completion, True), Part(None, True)], tiny.tokenizer())
    assert int(found.n_bytes.sum()) == len((prompt + completion).encode())
    assert int((found.n_bytes * found.learned).sum()) == len(completion.encode())


# -- windows


def row_of(n: int, first_learned: int = 0) -> Tokens:
    return Tokens(torch.arange(n), torch.arange(n) >= first_learned, torch.ones(n, dtype=torch.int64))


def test_segments_by_hand():
    found = pack.segments(
        row_of(8, first_learned=4), 3
    )  # predictions 0..6 in threes, those of tokens 1, 2, 3 not learned
    assert [s.inputs.tolist() for s in found] == [[3, 4, 5], [6]]
    assert [s.labels.tolist() for s in found] == [[4, 5, 6], [7]]
    assert pack.segments(row_of(5, first_learned=3), 9)[0].labels.tolist() == [IGNORED, IGNORED, 3, 4]
    assert pack.n_bytes([tuple(pack.segments(row_of(5, first_learned=3), 9))]) == 2


@given(st.integers(2, 60), st.integers(1, 9))
def test_every_token_but_the_first_is_predicted_once(n, length):
    found = pack.segments(row_of(n), length)
    assert torch.cat([s.labels for s in found]).tolist() == list(range(1, n))
    assert torch.cat([s.inputs for s in found]).tolist() == list(range(n - 1))
    assert max(len(s.inputs) for s in found) <= length


@given(st.lists(st.integers(2, LENGTH + 1), min_size=1, max_size=60))
def test_packing_loses_nothing_and_leaves_no_window_that_the_next_row_fitted_in(sizes):
    found = [s for n in sizes for s in pack.segments(row_of(n), LENGTH)]
    windows = pack.pack(found, LENGTH)
    assert Counter(id(s.labels) for w in windows for s in w) == Counter(id(s.labels) for s in found)
    used = [sum(len(s.inputs) for s in w) for w in windows]
    assert max(used) <= LENGTH
    assert all(u + len(after[0].inputs) > LENGTH for u, after in zip(used, windows[1:], strict=False))


def test_collate_by_hand():
    a, b, c = (
        Segment(torch.tensor(i), torch.tensor(y), torch.ones(len(i)))
        for i, y in (([1, 2], [2, 3]), ([4], [5]), ([6], [7]))
    )
    assert {k: v.tolist() for k, v in pack.collate([(a, b), (c,)], 9).items()} == {
        "input_ids": [[1, 2, 4], [6, 9, 9]],
        "labels": [[2, 3, 5], [7, IGNORED, IGNORED]],
        "position_ids": [[0, 1, 0], [0, 0, 1]],
    }
    assert "position_ids" not in pack.collate([(a,), (c,)], 9)


@pytest.mark.parametrize("model", [models.llama, models.gpt2])
def test_packed_loss_and_gradient_are_those_of_the_texts_apart(model):
    """axolotl 3453, unsloth 126, MeetKai 265: packed texts that see each other, or whose loss is 0."""
    net = model().double()
    draw = torch.Generator().manual_seed(0)
    rows = [
        Tokens(
            torch.randint(models.VOCABULARY, (n,), generator=draw), torch.arange(n) > n // 3, torch.ones(n)
        )
        for n in (9, 5, 14, 2)
    ]
    found = [s for r in rows for s in pack.segments(r, 30)]
    windows = pack.pack(found, 30)
    assert len(windows) == 1 and len(windows[0]) == 4
    together, n = loss(net, pack.collate([*windows, (found[0],)], 0))  # the second row of the batch is padded
    apart = [loss(net, pack.collate([(s,)], 0)) for s in (*found, found[0])]
    assert n == sum(count for _, count in apart)
    torch.testing.assert_close(together, sum(value for value, _ in apart), rtol=1e-10, atol=0)
    weights = [p for p in net.parameters() if p.requires_grad]
    pairs = zip(
        torch.autograd.grad(together, weights),
        torch.autograd.grad(sum(value for value, _ in apart), weights),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_loss_is_the_cross_entropy_of_the_labelled_tokens():
    net = models.llama().double()
    ids = torch.randint(models.VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.tensor([False, False, True, True, False, True]), ids[:, 1:], IGNORED)
    batch = {"input_ids": ids[:, :-1], "labels": labels}
    p = net(ids[:, :-1]).logits[0].softmax(-1)
    expected = -sum(p[i, int(ids[0, i + 1])].log() for i in (2, 3, 5))
    value, n = loss(net, batch)
    assert n == 3
    torch.testing.assert_close(value, expected)


def test_models_in_which_packed_texts_see_each_other_are_refused():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    with pytest.raises(ConfigError) as e:
        checks.check_packing(OPTForCausalLM(OPTConfig(max_position_embeddings=64, **sizes)))
    assert (
        str(e.value) == "in a OPTForCausalLM, texts packed into one window see each other; use packing=False"
    )
    for model in (models.llama(), models.gpt2(), models.llama().bfloat16()):
        checks.check_packing(model)


# -- order and split


def windows(n: int) -> list[pack.Window]:
    return [(Segment(torch.tensor([i]), torch.tensor([i]), torch.ones(1)),) for i in range(n)]


def drawn(found: list[list[pack.Window]]) -> list[int]:
    return [int(w[0].inputs[0]) for micro in found for w in micro]


def test_order_is_a_function_of_seed_epoch_and_index():
    one = order.Order(windows(7), 2, 2, total=24, seed=3)
    assert one.steps == 6
    every = [i for step in range(6) for i in drawn(one.step(step))]
    assert (
        all(sorted(every[7 * e : 7 * e + 7]) == list(range(7)) for e in range(3)) and every[:7] != every[7:14]
    )
    other = order.Order(
        windows(7), 1, 4, total=24, seed=3
    )  # whatever was asked for before, in whatever micro-batches
    assert [drawn(other.step(step)) for step in (5, 0, 3)] == [every[20:24], every[:4], every[12:16]]
    assert drawn(order.Order(windows(7), 2, 2, total=24, seed=4).step(0)) != every[:4]


def test_the_last_step_may_be_smaller():
    ragged = order.Order(windows(7), 2, 2, total=7, seed=0)
    assert ragged.steps == 2
    assert [len(micro) for micro in ragged.step(1)] == [2, 1]


def of_length(*lengths: int) -> list[pack.Window]:
    return [
        (Segment(torch.full((n,), i), torch.zeros(n, dtype=torch.int64), torch.ones(n)),)
        for i, n in enumerate(lengths)
    ]


def test_windows_that_are_not_packed_come_with_others_of_their_length():
    lengths = [7, 1, 5, 3, 8, 2, 6, 4] * 60  # 480 windows: two stretches and a half of 50 batches
    given = of_length(*lengths)
    one = order.Order(given, 4, 1, total=960, seed=3, sizes=lengths)
    steps = [drawn(one.step(step)) for step in range(240)]
    for epoch in (steps[:120], steps[120:]):
        assert sorted(i for step in epoch for i in step) == list(range(480))
    positions = sum(4 * max(lengths[i] for i in step) for step in steps)
    plain = order.Order(given, 4, 1, total=960, seed=3)
    without = sum(4 * max(lengths[i] for i in drawn(plain.step(step))) for step in range(240))
    assert 1 - 2 * sum(lengths) / positions < 0.05 < 0.25 < 1 - 2 * sum(lengths) / without
    longest = [max(lengths[i] for i in step) for step in steps[:50]]
    assert longest != sorted(longest)  # the batches themselves come in a random order
    again = order.Order(given, 4, 1, total=960, seed=3, sizes=lengths)
    assert [drawn(again.step(step)) for step in (130, 7, 119)] == [steps[130], steps[7], steps[119]]


def test_split_keeps_equal_rows_together_and_takes_a_tenth():
    rows = [Row("pair", {"prompt": str(i % 50), "completion": "y"}, f"line {i}") for i in range(100)]
    train, valid = split.split_off(rows, 0)
    assert len(valid) == 10 and not {r.columns["prompt"] for r in train} & {
        r.columns["prompt"] for r in valid
    }
    assert split.split_off(rows, 0) == (train, valid) != split.split_off(rows, 1)


def test_few_texts_give_their_last_tenth_at_a_line_end():
    train, valid = split.split_off([Row("text", {"text": "line\n" * 40}, "a.txt")], 0)
    assert (train[0].columns["text"], valid[0].columns["text"]) == ("line\n" * 37, "line\n" * 3)
    assert valid[0].where == "a.txt (end)"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("text", {"text": "x"}, "a.txt"), "a.txt: 1 characters are too few to split off validation text"),
        (
            Row("pair", {"prompt": "", "completion": "y"}, "line 1"),
            "line 1: a single example cannot be split",
        ),
    ],
)
def test_too_little_to_split_is_refused(row, message):
    with pytest.raises(DataError) as e:
        split.split_off([row], 0)
    assert str(e.value) == f"{message}; give valid or more data"
