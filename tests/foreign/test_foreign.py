"""Text from elsewhere is read under limits, and shown rather than obeyed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models, tiny
from transformers import LlamaConfig

import veneer
from veneer import foreign, settings
from veneer.cli.frame import main
from veneer.convert import read
from veneer.data import tokens
from veneer.data.chat import Part, limits, templates
from veneer.data.row_files import json_object
from veneer.errors import ConfigError, DataError, FormatError, SiteError
from veneer.models import pretrained
from veneer.runs import card, usage
from veneer.serve.errors import RequestError
from veneer.serve.http import asks
from veneer.serve.http.fields import Message
from veneer.train.folder import lock

SLOW = r"(a+)+\d"  # doubles its time with every a


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(foreign, "SECONDS", 1.0)
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    foreign._ends.cache_clear()


# -- code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["of its own", "beside a known one"])
def test_code_in_a_models_folder_is_never_run(kind, tmp_path, monkeypatch):
    config = LlamaConfig(**models.llama().config.to_dict()).to_dict()
    own = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    config |= {"auto_map": own, **({"model_type": "mine"} if kind == "of its own" else {})}
    models.llama().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks on a terminal
    if kind == "of its own":
        with pytest.raises(ConfigError, match="Veneer never runs code from a model's folder or the hub"):
            pretrained.config(str(tmp_path))
        with pytest.raises(ConfigError, match="Veneer never runs code from a model's folder or the hub"):
            pretrained.causal_lm(str(tmp_path), torch.float32, torch.device("cpu"))
    else:
        found = pretrained.causal_lm(str(tmp_path), torch.float32, torch.device("cpu"))
        assert type(found).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


# -- expressions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", [SLOW, r"(a|a)*\d", r"(a?){40}a{40}\d", r".*.*.*.*.*.*.*.*\d", r"((a*)*)*\d", r"(?:a|aa)+\d"]
)
def test_expressions_that_grow_fast_are_ended(pattern, quick):
    begun = time.monotonic()
    with pytest.raises(FormatError, match=r"takes too long on the names of the model"):
        foreign.check_expressions([pattern], ["a" * 200], "x")
    assert time.monotonic() - begun < 4


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|k|v)_proj",
        r"model\.layers\.\d+\.self_attn\..*",
        r"(.*\.)?(q_proj)$",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.l\.[\d]{1,}\.x)",
        "(unclosed",
    ],
)
def test_usual_expressions_pass(pattern):
    names = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(300)]
    foreign.check_expressions([pattern], names, "x")


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save"])
def test_expressions_in_files_of_peft_run_under_a_limit(key, quick, tmp_path):
    class Long(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.__setattr__("a" * 60, torch.nn.Linear(4, 4))

        def forward(self, x):
            return next(self.children())(x)

    model = veneer.attach(Long(), "lora", to="all-linear", rank=2)
    models.randomise(model)
    veneer.save(model, tmp_path / "a", probe={"x": torch.ones(1, 4)})
    (tmp_path / "a" / "veneer.json").unlink()
    path = tmp_path / "a" / "adapter_config.json"
    value = {"rank_pattern": {SLOW: 3}, "modules_to_save": [SLOW]}.get(key, SLOW)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    for reader in (lambda: veneer.load(Long(), tmp_path / "a"), lambda: read(tmp_path / "a")):
        with pytest.raises(FormatError, match=r"takes too long on the names of the model"):
            reader()


@pytest.mark.parametrize("options", [{"to": SLOW}, {"exclude": SLOW}, {"rank_pattern": {SLOW: 2}}])
def test_expressions_of_settings_run_under_a_limit(options, quick):
    class Long(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.__setattr__("a" * 60, torch.nn.Linear(4, 4))
            self.other = torch.nn.Linear(4, 4)

    with pytest.raises((FormatError, SiteError), match=r"takes too long on the names of the model"):
        veneer.attach(Long(), "lora", rank=2, **options)


# -- templates ----------------------------------------------------------------------------------------------

TALK = [{"role": "user", "content": "hi"}]
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(s='a') %}{% for a in range(64) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "times": "{{ 'a' * 100000000000 }}",
    "times of a variable": "{% set n = messages[0].content %}{{ n * 100000000000 }}",
    "powers": "{{ 9 ** 99999999 }}",
    "length": "x" * (limits.SIZE + 1),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_templates_run_under_limits(kind, quick, monkeypatch):
    monkeypatch.setattr(limits, "BYTES", 1 << 28)
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"the chat template (takes too long|multiplies|must be at most)"):
        templates.rendered(TALK, tiny.tokenizer(), BOMBS[kind])
    assert time.monotonic() - begun < 4
    assert templates.rendered(TALK, tiny.tokenizer(), "{{ messages[0].content }}") == "hi"


def test_a_server_gives_a_template_one_limit_for_all_forms(quick):
    begun = time.monotonic()
    message = Message(role="user", content="hi")
    with pytest.raises(RequestError, match="the chat template takes too long"):
        asks.conversation(tiny.tokenizer(), [message], own=BOMBS["loops"])
    assert time.monotonic() - begun < 3


TRACED = """
import sys, time
from jinja2 import Template
from veneer.data.chat import limits
from veneer.errors import DataError

limits.SECONDS = 0.1
for text in ({slow!r}, "{{{{ late() }}}}"):
    def late():  # the limit passes while the last call runs, so that its exception is late
        watch = limits._watch(__import__("os").getpid())
        watch.raised.add(me := __import__("threading").get_ident())
        limits._raise(me)
    try:
        with limits.limited(text):
            Template(text).render(late=late)
    except DataError:
        print("ended")
sys.settrace(lambda frame, event, arg: None)
for _ in range(10):
    (lambda: None)()
print("traced")
"""


def test_a_tracer_works_after_a_limit_was_exceeded():
    """A debugger, a measure of coverage or Hypothesis would hang for good."""
    program = TRACED.format(slow=BOMBS["loops"])
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == "ended" and run.stdout.split()[-1] == "traced"


@pytest.mark.parametrize("name", templates.names())
def test_our_own_templates_pass(name):
    assert limits.problem(templates.packaged(name, tiny.tokenizer())) is None


def test_a_limit_ends_one_thread_alone(quick):
    done = []

    def other():
        for _ in range(40):
            done.append(templates.rendered(TALK, tiny.tokenizer(), "{{ messages[0].content }}"))
            time.sleep(0.02)

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(DataError):
        templates.rendered(TALK, tiny.tokenizer(), BOMBS["loops"])
    thread.join()
    assert done == ["hi"] * 40


# -- YAML and JSON ------------------------------------------------------------------------------------------


def test_yaml_with_aliases_of_aliases_is_refused():
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    bomb = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]", *levels])
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=r"its aliases stand for more than 100,000 values"):
        settings.read_yaml(bomb, "run.yaml")
    with pytest.raises(ConfigError, match=r"an alias holds itself"):
        settings.read_yaml("a: &a [*a]", "run.yaml")
    for depth in (100, 600, 100_000):  # and the mapping; Python has no limit that is the same everywhere
        with pytest.raises(ConfigError, match=r"run\.yaml is not YAML: it is nested too deeply"):
            settings.read_yaml("a: " + "[" * depth + "]" * depth, "run.yaml")
    assert settings.read_yaml("a: " + "[" * 99 + "]" * 99, "run.yaml").keys() == {"a"}
    assert time.monotonic() - begun < 60  # written out, the aliases are 9 ** 9 values
    shared = "base: &base {lr: 1e-3}\nrun:\n  <<: *base\n  steps: 3\n"
    assert settings.read_yaml(shared, "run.yaml")["run"] == {"lr": 1e-3, "steps": 3}


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 300 + "]" * 300, '{"a":' * 120 + "1" + "}" * 120])
def test_deep_json_is_an_error_with_its_place(text, tmp_path):
    with pytest.raises(json.JSONDecodeError, match="nested deeper than 100 levels"):
        foreign.loads(text)
    with pytest.raises(DataError, match="nested deeper than 100 levels"):
        json_object(text)
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match=r"adapter_config\.json is not JSON: nested deeper"):
        veneer.load(models.llama(), tmp_path)


def test_json_up_to_the_limit_and_long_numbers():
    assert foreign.loads("[" * 100 + "]" * 100)
    with pytest.raises(json.JSONDecodeError, match="4300 digits"):
        foreign.loads("1" * 5000)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("r", "8", "r must be a whole number, got '8'"),
        ("r", True, "r must be a whole number, got True"),
        ("lora_alpha", [1], r"lora_alpha must be a whole number or a number, got \[1\]"),
        ("target_modules", {"a": 1}, "target_modules must be text or a list of names or null"),
        ("target_modules", ["q_proj", 3], r"target_modules must be .*, got \['q_proj', 3\]"),
        ("rank_pattern", ["q"], r"rank_pattern must be a table or null, got \['q'\]"),
        ("rank_pattern", {"(q": 2}, r"\(q.* is not a regular expression"),
        ("modules_to_save", "lm_head", "modules_to_save must be a list of names or null, got 'lm_head'"),
        ("peft_type", 3, "peft_type must be text, got 3"),
    ],
)
def test_wrong_types_in_a_file_of_peft_are_named(key, value, text, tmp_path):
    model = veneer.attach(models.llama(), "lora", to=["q_proj"], rank=2)
    models.randomise(model)
    veneer.save(model, tmp_path)
    (tmp_path / "veneer.json").unlink()
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(FormatError, match=text):
        veneer.load(models.llama(), tmp_path)


# -- terminals, cards, locks ---------------------------------------------------------------------------------

EVIL = "\x1b[2J\x07\x9b31m\u202e\x7f"


def test_control_characters_are_shown():
    shown = foreign.visible(f"a{EVIL}\n\tb")
    assert shown == "a␛[2J␇\\x9b31m\\u202e␡\n\tb"
    assert not any(c in shown for c in "\x1b\x07\x9b\u202e\x7f")


def test_errors_of_the_command_line_show_them(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / f"x{EVIL[:5]}")]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "␛[2J" in said


def test_names_from_a_file_are_shown_in_outcomes(tmp_path, capsys):
    model = veneer.attach(models.llama(), "lora", to=["q_proj"], rank=2)
    models.randomise(model)
    veneer.save(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k.replace("q_proj", f"q{EVIL}proj"): t for k, t in load_file(path).items()}, path)
    main(["inspect", str(tmp_path)])
    printed = "".join(capsys.readouterr())
    assert printed and not any(c in printed for c in "\x1b\x07\x9b\u202e\x7f")


def test_the_card_escapes_what_the_page_escapes():
    text = '<script>x</script> [a](b) `c` | d\x1b\n# e "q"'
    shown = card._escaped(text)
    assert "<" not in shown and "\n" not in shown and "\x1b" not in shown
    assert r"\[a\](b)" in shown and r"\`c\`" in shown and r"\|" in shown
    assert "`" not in card._code(text)[1:-1] and "\n" not in card._code(text)
    assert card._table(("a",), [("x|y",), (r"x\|y",)]).splitlines()[2:] == [r"| x\|y |", r"| x\|y |"]
    written = usage.quoted('a"\n``` b')
    assert "\n" not in written and "```" not in written and json.loads(f"[{written}]".replace("\\x60", "`"))


@pytest.mark.skipif(os.name == "nt", reason="symlinks need rights there")
def test_a_symlinked_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("keep")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="the lock is a symbolic link"), lock.held(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "keep"


# -- long texts ---------------------------------------------------------------------------------------------


def metaspace():
    """A tokenizer of SentencePiece's kind, which writes a mark for every space and one at the beginning."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(kinds.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    bpe.train_from_iterator([tiny.text(0, 400)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("tokenizer", [tiny.tokenizer, metaspace], ids=["bytes", "metaspace"])
@pytest.mark.parametrize("text", ["spaces", "lines", "one word", "accents"])
def test_pieces_have_the_tokens_of_the_whole(tokenizer, text, monkeypatch):
    line = tiny.text(1, 1200).replace("\n", " ")
    given = {
        "spaces": line,
        "lines": tiny.text(1, 1200),
        "one word": "a" * 3000,
        "accents": line.replace("a", "ä\N{MOUSE FACE}"),
    }[text]
    part, tok = Part(given, True), tokenizer()
    whole = tokens.encode([part], tok)
    monkeypatch.setattr(tokens, "PIECE", 512)
    cut = tokens.encode([part], tok)
    if text != "one word":  # a border inside a word changes tokens there
        assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    assert int(cut.n_bytes.sum()) == len(given.encode()) == int(whole.n_bytes.sum())


def test_a_long_line_takes_little_memory(monkeypatch):
    import tracemalloc

    monkeypatch.setattr(tokens, "PIECE", tokens.PIECE // 4)  # as a line of four times the length
    text = tiny.text(1, 40_000).replace("\n", " ") * 2
    tokenizer = tiny.tokenizer()
    tracemalloc.start()
    found = tokens.encode([Part(text, True)], tokenizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.ids) > 25_000
    assert peak < 50 * len(text)  # 75 bytes for each of the text in one piece
