"""The documentation: commands print the shown output, generated pages are complete, links have targets."""

from __future__ import annotations

import ast
import functools
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import tiny

from veneer import methods, optim, settings, tasks
from veneer.adapt.peft import refusals
from veneer.adapt.store import problems
from veneer.cli.app import command
from veneer.cli.frame import main
from veneer.cli.table import VERBS
from veneer.convert.tensor_roles import OTHERS
from veneer.methods import inits
from veneer.methods.base import described
from veneer.runs.fit import fit
from veneer.sites import Site
from veneer.sites.finding.unfit import DIRECT_READERS
from veneer.train.run import Run

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
QUICKSTART = (DOCS / "quickstart.md").read_text(encoding="utf-8")
FORMAT = (DOCS / "format.md").read_text(encoding="utf-8")
WRITTEN = sorted(p for p in DOCS.rglob("*.md") if "generated" not in p.parts)
# Flags of other programs that the pages name.
FOREIGN = set("--logdir --append --backend-store-uri --project --debug".split())
FOREIGN |= set(
    "--nproc-per-node --nnodes --rdzv-backend --rdzv-endpoint --max-restarts".split()
)  # torchrun's
FOREIGN |= set("--enable-lora --max-lora-rank --lora-modules --replicas".split())


@pytest.fixture(scope="module")
def tools():
    """The scripts that make the pages and check the links, as modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        import links
        import pages
        import pages.markdown

        yield {"links": links, "pages": pages, "markdown": pages.markdown}
        for name in [n for n in sys.modules if n == "links" or n.split(".")[0] == "pages"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def written(tools, tmp_path_factory) -> dict[str, str]:
    """The generated pages by name."""
    folder = tmp_path_factory.mktemp("generated")
    tools["pages"].write(folder, DOCS / "notes")
    return {p.name: p.read_text(encoding="utf-8") for p in folder.iterdir()}


# -- the quickstart ---------------------------------------------------------------------------------------


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The commands of a page with the lines that it shows below each."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def skeleton(line: str) -> str:
    """The line without its numbers and the width of its columns."""
    return " ".join(re.sub(r"[-+]?\d[\d,.]*", "#", line).split())


def missing(shown: list[str], printed: str) -> str | None:
    """Returns the first shown line that is missing in the output; "..." stands for any text."""
    rest = [skeleton(line) for line in printed.splitlines()]
    for line in shown:
        parts = [re.escape(skeleton(part)) for part in line.split("...")]
        if line.strip() in ("", "..."):
            continue
        at = next((i for i, other in enumerate(rest) if re.fullmatch(".*".join(parts), other)), None)
        if at is None:
            return line
        rest = rest[at + 1 :]
    return None


def test_every_command_of_the_quickstart_prints_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Windows of each text: figures are not compared.
    monkeypatch.setattr(tasks.get(tasks.DEFAULT), "EVALUATED", 4)
    for name, content in re.findall(r"in `(\S+)`:\n\n```json\n(.*?)```", QUICKSTART, re.DOTALL):
        (tmp_path / name).write_text(content, encoding="utf-8")
    every = commands(QUICKSTART)
    assert [
        line.split()[1] for line, _ in every
    ] == "data plan fit generate eval inspect verify merge export convert".split()
    for line, shown in every:
        program, *words = shlex.split(line)
        assert program == "veneer" and shown
        capsys.readouterr()
        code = main(words)
        out, err = capsys.readouterr()
        assert code == 0, err
        assert missing(shown, f"{err}\n{out}") is None, f"{line}\n{err}\n{out}"
    for block in re.findall(r"^```python\n(.*?)^```", QUICKSTART, re.DOTALL | re.MULTILINE):
        exec(block, {})
    assert (tmp_path / "runs" / "prose" / "report.html").is_file() and (
        tmp_path / "runs" / "chats" / "results.json"
    ).is_file()


def test_the_comparison_of_outputs_can_fail():
    assert missing(["kept 4.2%; ...", "ends"], "begins\nkept 17%; of much\nends") is None
    assert missing(["ends", "kept 4.2%"], "kept 1%\nends") == "kept 4.2%"
    assert missing(["lost"], "kept") == "lost"


# -- generated pages --------------------------------------------------------------------------------------


def test_the_page_of_methods_has_every_file_and_option(written):
    text = written["methods.md"]
    for name in (*methods.available(), *inits.available(), *optim.available()):
        assert f"\n### {name}\n" in text
    for option in methods.options_of(methods.get("lora")):
        assert f"`--{option.replace('_', '-')}`" in text
    assert "Begin here." in text and "(https://arxiv.org/abs/2402.09353)" in text


def test_the_entries_have_the_same_headings():
    label = re.compile(r"^([A-Z][a-z]+): ", re.MULTILINE)
    for names, get, wanted in (
        (methods.available(), methods.get, ["Parameters", "State", "Cost", "Use", "Against"]),
        (optim.available(), optim.get, ["State", "Cost", "Use", "Against"]),
    ):
        for name in names:
            assert label.findall(described.of_module(get(name)).rest) == wanted, name
    for name in inits.available():
        assert label.findall(described.of_module(inits.get(name).start).rest) in (
            [],
            ["State", "Cost", "Use", "Against"],
        ), name


def test_a_new_method_is_there_as_soon_as_its_file_is(tools, tmp_path, monkeypatch):
    code = '"""Nil: W\' = W * 1, for nothing.  Nobody 2026, https://example.org/nil\n\nUse: never.\n"""\n'
    code += "from veneer.methods.base.delta import DenseDelta\n\n\nclass Nil(DenseDelta):\n"
    code += "    def __init__(self, site, *, depth: int = 3) -> None:\n"
    code += '        """\n        depth: how deep\n        """\n'
    (tmp_path / "nil.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    try:
        tools["pages"].write(tmp_path / "pages", tmp_path)
    finally:
        sys.modules.pop("veneer.methods.nil", None)
    text = (tmp_path / "pages" / "methods.md").read_text(encoding="utf-8")
    section = text.split("### nil\n")[1].split("\n### ")[0]
    assert "Nil: W' = W \\* 1, for nothing. Nobody 2026 ([paper](https://example.org/nil))." in section
    assert (
        "- **Use**: never." in section
        and "| `--depth` | how deep \\[3\\] |" in section
        and "Veneer's own file" in section
    )


def test_the_page_of_commands_has_every_verb_and_flag(written):
    for name in VERBS:
        section = written["cli.md"].split(f"\n## veneer {name}\n")[1].split("\n## ")[0]
        flags = [
            o
            for p in command(name).params
            if p.name not in ("help", "debug") and p.param_type_name == "option"
            for o in p.opts
        ]
        assert [o for o in flags if f"`{o}`" not in section] == []


def test_the_page_of_python_has_every_name_and_setting(written):
    import veneer

    text = written["api.md"]
    assert [
        n for n in veneer.__all__ if n != "Run" and f"### veneer.{n}\n" not in text and f".{n}\n" not in text
    ] == []
    assert [s for s in settings.table(Run) if f"| `{s}` |" not in text] == []


def test_pages_that_did_not_change_are_not_written_again(tools, tmp_path):
    tools["pages"].write(tmp_path, DOCS / "notes")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    tools["pages"].write(tmp_path, DOCS / "notes")
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}


def test_docstrings_become_markdown_that_says_the_same(tools):
    prose = tools["markdown"].prose
    assert prose("a * b_c, `x*y` and https://a.org/b.") == "a \\* b\\_c, `x*y` and <https://a.org/b>."
    assert (
        prose("Rank r.\n\nrank: how\n  many\nto: where", ["rank", "to"])
        == "Rank r.\n\n- `rank`: how many\n- `to`: where"
    )
    assert prose("It does:\n\n    a  b\n    c").endswith("```text\n    a  b\n    c\n```")
    assert prose("Cost: 1\nUse: 2") == "- **Cost**: 1\n- **Use**: 2"
    assert (
        prose("a, b: two. c: one\nmore. Raises FormatError.", ["a", "b", "c"])
        == "- `a`, `b`: two.\n- `c`: one more.\n\nRaises FormatError."
    )
    assert prose("It is a: no list.", ["a"]) == "It is a: no list."


def test_every_note_belongs_to_something():
    known = {*methods.available(), *inits.available(), *optim.available()}
    assert [p.stem for p in (DOCS / "notes").glob("*.md") if p.stem not in known] == []


# -- hand-written pages -----------------------------------------------------------------------------------


@functools.cache
def flags() -> set[str]:
    """The flags of all commands."""
    return {o for name in VERBS for p in command(name).params for o in (*p.opts, *p.secondary_opts)}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: p.relative_to(DOCS).as_posix())
def test_flags_and_settings_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - flags() - FOREIGN == set()
    for word in re.findall(r"`veneer ([a-z-]+)", text):
        assert word in VERBS, f"veneer {word}"


def test_translation_tables_name_what_exists():
    known = {*settings.table(Run), *methods.options_of(methods.get("lora")), *methods.available(), *VERBS}
    for page in ("axolotl", "llama-factory"):
        text = (DOCS / "from" / f"{page}.md").read_text(encoding="utf-8")
        for row in re.findall(r"^\| `.*\| (.*) \|$", text, re.MULTILINE):
            names = re.findall(r"`([a-z_]+)(?::[^`]*)?`", row)
            assert [n for n in names if n not in known] == [], row


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run's folder."""
    folder = tmp_path_factory.mktemp("format")
    return fit(Run.from_dict(tiny.settings(folder, steps=4, eval_every=2)), progress=False).folder


def table(section: str) -> set[str]:
    """Returns the words in code in the first columns of the tables of a section of format.md."""
    part = re.split(rf"^#+ {re.escape(section)}$", FORMAT, flags=re.MULTILINE)[1]
    rows = re.findall(
        r"^\| ((?:`[^`]+`(?:, )?)+)", re.split(r"^#", part, flags=re.MULTILINE)[0], re.MULTILINE
    )
    return {word for row in rows for word in re.findall(r"`([^`]+)`", row)}


def read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_the_manifest_has_what_the_page_of_files_says(run):
    record = read(run / "adapter" / "veneer.json")
    every = {*record, *(key for site in record["sites"].values() for key in site)}
    assert every == table("veneer.json")
    assert set(record["probe"]) == {"inputs", "shape", "where", "off", "on", "dtype", "precision"}
    assert set(record["tensors"]) == {"file", "sha256", "bytes"}
    assert {p.name for p in (run / "adapter").iterdir()} <= table("An adapter")
    kinds = set(re.findall(r"`(\w+)`", re.search(r"the kind of layer: (.*)", FORMAT)[1]))
    assert kinds == {k.kind for k in every_site()}


def every_site() -> list[type[Site]]:
    found, left = [], [Site]
    while left:
        kind = left.pop()
        left += kind.__subclasses__()
        found += [kind] if "kind" in vars(kind) and isinstance(vars(kind)["kind"], str) else []
    return [k for k in found if k.__module__.startswith("veneer.")]


def test_a_run_has_what_the_page_of_files_says(run):
    assert {p.name for p in run.iterdir()} - {"adapter", "checkpoints"} <= table("A run")
    words = set(re.findall(r"`([\w.]+)`", FORMAT.split("## A run")[1]))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {key for line in lines for key in line} <= words
    assert set(read(run / "results.json")) <= words
    config = read(run / "config.json")
    assert set(config) - {"veneer"} <= words and set(config["base"]) <= {"model", "class", "sha256"}


def test_a_checkpoint_has_what_the_page_of_files_says(run):
    folder = max((run / "checkpoints").iterdir())
    assert {p.name for p in folder.iterdir()} == table("A checkpoint")
    assert set(read(folder / "meta.json")) == {
        *("step", "position", "metrics_bytes", "metrics_sha256", "owner", "strides")
    }
    prefixes = {name.partition(".")[0] for name in load_file(folder / "state.safetensors")}
    assert prefixes <= {"p", "b", "o", "rng"} and {"p", "o", "rng"} <= prefixes


def test_every_check_on_loading_is_on_the_page_of_files():
    assert table("What is checked on loading") == set(problems.ALLOW)


def test_names_of_the_package_that_pages_call_exist():
    import veneer

    called = {
        name
        for page in WRITTEN
        for name in re.findall(r"\bveneer\.([a-z_]+)\(", page.read_text(encoding="utf-8"))
    }
    assert called - set(veneer.__all__) == set() and len(called) > 8


def test_links_of_the_repository_lead_somewhere(tools):
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + WRITTEN
    assert [
        b for b in tools["links"].broken(files) if "generated/" not in b
    ] == []  # those are checked in the built site


def test_broken_links_are_found(tools, tmp_path, capsys):
    links = tools["links"]
    (tmp_path / "a.md").write_text(
        "# One two\n[x](b.md) [y](#one-two) [z](#three) `[c](no.md)`\n", encoding="utf-8"
    )
    assert [b.split(": ", 1)[1] for b in links.broken([tmp_path / "a.md"])] == [
        "b.md: file is missing",
        "#three: anchor is missing",
    ]
    (tmp_path / "a.html").write_text(
        '<p id="x"><a href="#x">1</a><a href="b.html#y">2</a><a href="https://a.org">3</a>', encoding="utf-8"
    )
    (tmp_path / "b.html").write_text("<p>", encoding="utf-8")
    assert links.main(tmp_path) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("b.html#y: anchor is missing") and printed[1].startswith(
        "2 pages, 1 broken links; 1 links"
    )
    assert links.external([tmp_path / "a.html"]) == ["https://a.org"]


# -- what is refused on purpose -----------------------------------------------------------------------------


@functools.cache
def trees() -> list[ast.Module]:
    return [ast.parse(p.read_text(encoding="utf-8")) for p in (ROOT / "src").rglob("*.py")]


def text_of(node: ast.AST) -> str | None:
    """The text that a node writes down, with {} for its values; None for other nodes."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return str(node.value) if is_text else None  # type: ignore[attr-defined]


@functools.cache
def sentences() -> str:
    """Every text in the source."""
    found = (text_of(node) for tree in trees() for node in ast.walk(tree))
    return "\n".join(text for text in found if text)


def refused() -> list[list[str]]:
    """The rows of the page: case, reason, way out, and a part of the error."""
    lines = (DOCS / "refused.md").read_text(encoding="utf-8").splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] != "refused"]


@pytest.mark.parametrize("row", refused(), ids=lambda row: row[0][:40])
def test_a_refusal_has_a_reason_a_way_out_and_the_words_of_the_source(row):
    assert len(row) == 4 and all(row)
    (said,) = re.findall(r"`([^`]+)`", row[3])
    assert said in sentences()


def test_the_page_of_refusals_lacks_none_of_the_lists_in_the_source():
    page = (DOCS / "refused.md").read_text(encoding="utf-8")
    kinds = [*refusals.BEYOND, *(reader for reader, *_ in DIRECT_READERS), *OTHERS]
    assert [k for k in kinds if k not in page] == []
    said = [row[3].strip("`") for row in refused()]
    merges = [text for text in raised("NotMergeable") if not any(s in text for s in said)]
    assert merges == []


def raised(name: str) -> list[str]:
    """The texts of all errors of one kind that the source raises."""
    errors = (n.exc for tree in trees() for n in ast.walk(tree) if isinstance(n, ast.Raise))
    calls = [e for e in errors if isinstance(e, ast.Call) and getattr(e.func, "id", "") == name]
    return [text for call in calls if call.args and (text := text_of(call.args[0]))]
