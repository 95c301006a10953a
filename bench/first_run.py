"""First runs on public data and chat templates: what is learned of each, or the reason why it is refused.

    python bench/first_run.py [--write]

Every row format of well-known public sets, rebuilt by hand, and every original chat template of the installed
trl package with one turn, several turns, thinking and tools: `data show` must mark the answers as learned and
no question, and `fit --steps 2` must end. Nothing is timed. --write keeps the outcome in
bench/results/first_run.json, from which docs/data.md has its lists.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from _row_formats import FORMATS, OTHER, TOOL, said

from veneer import embedded
from veneer.errors import VeneerError
from veneer.models import machine
from veneer.runs.fit import fit
from veneer.train.run import Run
from veneer.verbs.data.show import show

RESULTS = Path(__file__).parent / "results" / "first_run.json"
ROWS = 12
SPECIAL = re.compile(
    r"<\|[^|<>\s{}']+\|>|<｜[^｜<>{}']+｜>|\[/?(?:INST|TOOL_[A-Z]+|AVAILABLE_TOOLS)\]|<(?:start|end)_of_turn>"
)
ENDS = ("<|im_end|>", "<|eot_id|>", "<|return|>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "<|eot|>")
RIGHT = "right"


def templates() -> dict[str, str]:
    """Returns the original templates of the trl package by name."""
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None, "install trl"
    files = sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))
    return {p.stem: p.read_text(encoding="utf-8") for p in files if not p.stem.endswith("_training")}


def talks() -> dict[str, Any]:
    """Returns, by kind, a function from question and answer to a row, and the other words to learn."""
    call = {
        "type": "function",
        "id": "call_1x2y3",
        "function": {"name": "add", "arguments": {"a": 1, "b": 2}},
    }
    result = {"role": "tool", "name": "add", "tool_call_id": "call_1x2y3", "content": "3"}
    return {
        "one turn": (lambda q, a: {"messages": said(("user", q), ("assistant", a))}, []),
        "several turns": (
            lambda q, a: {
                "messages": said(("user", OTHER[0]), ("assistant", OTHER[1]), ("user", q), ("assistant", a))
            },
            [OTHER[1]],
        ),
        "thinking": (
            lambda q, a: {
                "messages": said(("user", q), ("assistant", f"<think>\nTwo pairs.\n</think>\n\n{a}"))
            },
            ["Two pairs."],
        ),
        "tools": (
            lambda q, a: {
                "messages": [
                    {"role": "user", "content": "Add 1 and 2."},
                    {"role": "assistant", "tool_calls": [call]},
                    result,
                    *said(("assistant", OTHER[1]), ("user", q), ("assistant", a)),
                ],
                "tools": [TOOL],
            },
            ["add", OTHER[1]],
        ),
    }


def base(folder: Path, template: str | None = None) -> Path:
    """Writes a small random Llama with the built-in tokenizer, the template and its special tokens."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(embedded.folder()))
    if template is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(template)))})
        end = next((e for e in ENDS if e in template), tokenizer.eos_token)
        tokenizer.add_special_tokens({"eos_token": end, "bos_token": "<BOS>"})
        tokenizer.chat_template = template
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def outcome(
    model: Path, make: Any, work: Path, *, whole: bool = False, also: Sequence[str] = (), **own: Any
) -> str:
    """Returns "right", the reason of a refusal, or "wrong: " and what is."""
    asked = [(f"Say sum {n}.", f"Sum{n} is {2 * n}") for n in range(ROWS)]
    data = work / "rows.jsonl"
    data.write_text("\n".join(json.dumps(make(*pair)) for pair in asked) + "\n", encoding="utf-8")
    given = {"model": str(model), "data": str(data), "known": "none", **own}
    try:
        found = show(Run(**given), ROWS)
        wrong = _unlearned(found["rows"], asked, also, whole)
        if wrong:
            return f"wrong: {wrong}"
        shutil.rmtree(work / "run", ignore_errors=True)
        fit(Run(**given, steps=2, out=str(work / "run"), report=False, device="cpu"), progress=False)
    except VeneerError as e:
        return _reason(str(e), data)
    return RIGHT


def _unlearned(rows: Sequence[Mapping[str, Any]], asked: Any, also: Sequence[str], whole: bool) -> str:
    """Returns what is wrong with what is learned of the rows."""
    where: dict[str, str] = {}
    for row in rows:
        name = row["where"].partition(", example")[0]
        where[name] = where.get(name, "") + "".join(t["text"] for t in row["tokens"] if t["learned"])
    # A tenth of the rows is set aside as valid text.
    questions = {answer: question for question, answer in asked}
    for learned in where.values():
        answer = next((a for a in questions if re.search(rf"{re.escape(a)}\b", learned)), None)
        if answer is None:
            return f"no answer is learned: {learned!r}"
        missing = [words for words in also if words not in learned]
        if missing:
            return f"not learned: {missing[0]!r}"
        if (questions[answer] in learned) is not whole:
            return f"the question is {'not ' if whole else ''}learned"
    return ""


def _reason(message: str, data: Path) -> str:
    first = message.splitlines()[0].replace(str(data), "").strip()
    return re.sub(r"^line \d+: ", "", first)


def measured() -> dict[str, Any]:
    """Returns the outcome of every format, and of every template with every kind of conversation."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        plain = base(work / "plain")
        formats = {f.name: outcome(plain, f.row, work, whole=f.whole, **f.settings) for f in FORMATS}
        found: dict[str, dict[str, str]] = {}
        for name, template in templates().items():
            model = base(work / "base", template)
            found[name] = {
                kind: outcome(model, make, work, also=also) for kind, (make, also) in talks().items()
            }
            shutil.rmtree(model)
    return {"formats": formats, "templates": found}


def figures(found: Mapping[str, Any]) -> dict[str, int]:
    """Returns counts of what is right, refused with a reason, and wrong."""
    every = Counter(kind_of(v) for kinds in found["templates"].values() for v in kinds.values())
    formats = Counter(map(kind_of, found["formats"].values()))
    return {
        "formats": len(found["formats"]),
        "formats_right": formats[RIGHT],
        "templates": len(found["templates"]),
        "templates_right": every[RIGHT],
        "templates_refused_with_reason": every["refused"],
        "templates_wrong": every["wrong"],
    }


def kind_of(result: str) -> str:
    """Returns right, wrong or refused."""
    return result if result == RIGHT else "wrong" if result.startswith("wrong") else "refused"


def lists(record: Mapping[str, Any]) -> str:
    """Returns the three lists of docs/data.md."""
    found, counts = record, record["figures"]
    right = [name for name, result in found["formats"].items() if result == RIGHT]
    kinds = list(talks())
    whole = [n for n, by in found["templates"].items() if all(v == RIGHT for v in by.values())]
    lines = [
        *wrap(f"Row formats, {counts['formats_right']} of {counts['formats']}: {'; '.join(right)}.", 108),
        "",
        *wrap(
            f"Templates of trl {record['versions']['trl']} with {', '.join(kinds[:-1])} and {kinds[-1]},"
            f" {len(whole)} of {counts['templates']}: {', '.join(whole)}.",
            108,
        ),
        "",
        "Refused, with the reason:",
        "",
        "| template | conversation | reason |",
        "| --- | --- | --- |",
        *(f"| {name} | {kind} | {reason} |" for name, kind, reason in refusals(found)),
    ]
    return "\n".join(lines)


def refusals(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields template, kind of conversation and reason of every refusal."""
    for name, by in found["templates"].items():
        for kind, result in by.items():
            if result != RIGHT:
                yield name, kind, result.replace("|", "\\|")


def main() -> None:
    import trl

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="keep the outcome in bench/results")
    args = parser.parse_args()
    found = measured()
    versions = {**machine.versions(), "trl": trl.__version__}
    line = {"bench": "first_run", "device": "cpu", "versions": versions, "figures": figures(found), **found}
    if args.write:
        RESULTS.write_text(json.dumps(line, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
