"""Finds sentences, lines, functions, files and folders that break the rules of CONTRIBUTING.

`python tests/support/wording.py` prints every finding; a path limits the list. `--shrink` rewrites the
lists in tests/project/left: removes mended entries and lowers counts, but adds nothing.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LEFT = ROOT / "tests" / "project" / "left"
COLUMNS, FILE_LINES, FUNCTION_LINES, MODULES = 110, 250, 40, 15
REGISTRIES = {
    f"src/veneer/{name}"
    for name in (
        "methods",
        "methods/inits",
        "optim",
        "tasks",
        "train/track",
        "convert/dialects",
        "convert/settings",
    )
}
OPENING = re.compile(
    r"(What|Whether|Which|How|That|The ones? that|The ones? whose|Those (that|who|which|whose))\b"
)
PHRASES = re.compile(
    r"\b(is|are|was|were) no (?!longer\b)|\b(is|are|was|were|has|have) none\b"
    r"|\b(is|are|was|were) (told|said)\b"
    r"|\btold of\b|(?<!just) as (it is|they are)\b|\bas ever\b|\bis nothing that\b|\bnot foreseen\b"
)
# Words about words: this file and the rules themselves must name what they forbid.
ASIDE = {"tests/support/wording.py", "tests/project/test_language.py"}


class Finding(NamedTuple):
    kind: str  # "sentences", "columns", "function", "file" or "folder"
    place: str  # a path, for functions with "::" and the name
    line: int
    text: str
    count: int = 1


def sentences(file: str, source: str) -> Iterator[Finding]:
    """Yields docstrings, comments and strings of a Python file that hold a forbidden opening or phrase."""
    tree = ast.parse(source)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings.add(id(first.value))
                if OPENING.match(first.value.value.strip()):
                    yield Finding("sentences", file, first.lineno, first.value.value.strip()[:90])
    if file.startswith("tests/"):
        return  # tests quote texts; their docstrings are held to the rule of openings
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from phrases(file, node.lineno, node.value)
    for line, text in comments(source):
        if OPENING.match(text):
            yield Finding("sentences", file, line, text[:90])
        yield from phrases(file, line, text)


def comments(source: str) -> list[tuple[int, str]]:
    """Returns (first line, text) of the comments; lines of comments below each other are one text."""
    found: list[tuple[int, str]] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#").strip()
            alone = token.line.lstrip().startswith("#")
            if alone and found and last == token.start[0] - 1:
                found[-1] = (found[-1][0], f"{found[-1][1]} {text}")
            else:
                found.append((token.start[0], text))
            last = token.start[0] if alone else -1
    return found


def phrases(file: str, line: int, text: str) -> Iterator[Finding]:
    """Yields a finding for each forbidden phrase of the text."""
    flat = " ".join(text.split())
    for match in PHRASES.finditer(flat):
        around = flat[max(0, match.start() - 40) : match.end() + 40]
        yield Finding("sentences", file, line, around)


def prose(file: str, text: str) -> Iterator[Finding]:
    """Yields forbidden phrases in the paragraphs of a Markdown page; blocks of code are left out."""
    flat = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    line = 1
    for paragraph in re.split(r"(\n\s*\n)", flat):
        yield from phrases(file, line, paragraph)
        line += paragraph.count("\n")


def columns(file: str, text: str) -> Iterator[Finding]:
    """Yields lines over 110 columns; rows of Markdown tables and lines that are one address may be longer."""
    for number, line in enumerate(text.splitlines(), 1):
        if (
            len(line) > COLUMNS
            and not (file.endswith(".md") and line.startswith("|"))
            and not lone_address(line)
        ):
            yield Finding("columns", file, number, line[:90])


def lone_address(line: str) -> bool:
    return re.fullmatch(r"\W*\S*https?://\S+\W*", line.strip()) is not None


def sizes(file: str, source: str) -> Iterator[Finding]:
    """Yields a file of src over 250 lines and functions over 40 lines, docstrings aside."""
    length = source.count("\n")
    if length > FILE_LINES:
        yield Finding("file", file, 1, f"{length} lines", length)

    def walk(node: ast.AST, above: str) -> Iterator[Finding]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{above}{child.name}"
                doc = ast.get_docstring(child, clean=False)
                lines = (
                    (child.end_lineno or child.lineno)
                    - child.lineno
                    + 1
                    - len(doc.split("\n") if doc else [])
                )
                if lines > FUNCTION_LINES and not isinstance(child, ast.ClassDef):
                    yield Finding("function", f"{file}::{name}", child.lineno, f"{lines} lines", lines)
                yield from walk(child, f"{name}.")
            else:
                yield from walk(child, above)

    yield from walk(ast.parse(source), "")


def folders() -> Iterator[Finding]:
    """Yields folders of src with more than 15 modules side by side."""
    every = Counter(
        p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "src").rglob("*.py") if p.name != "__init__.py"
    )
    for folder, count in every.items():
        if count > MODULES and folder not in REGISTRIES:
            yield Finding("folder", folder, 1, f"{count} modules", count)


def look_over() -> list[Finding]:
    """Returns the findings of the whole repository."""
    found = list(folders())
    for top in ("src", "tools", "bench", "tests"):
        for path in sorted((ROOT / top).rglob("*.py")):
            file, source = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
            found += [*columns(file, source), *([] if file in ASIDE else sentences(file, source))]
            found += sizes(file, source) if top == "src" else []
    pages = [*ROOT.glob("*.md")] + [p for p in (ROOT / "docs").rglob("*.md") if "generated" not in p.parts]
    for path in [*pages, ROOT / "bench" / "README.md"]:
        file, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        found += [*columns(file, text), *prose(file, text)]
    return found


def room(place: str) -> str:
    """Returns the list of a place: its room in src, else its first folder ("tests-train", "docs")."""
    parts = place.split("::")[0].split("/")
    if parts[0] == "src":
        return parts[2] if len(parts) > 3 else "src"
    return (
        f"tests-{parts[1]}"
        if parts[0] == "tests" and len(parts) > 2
        else parts[0]
        if len(parts) > 1
        else "pages"
    )


def counted(found: list[Finding]) -> dict[tuple[str, str], int]:
    """Returns the counts by kind and place."""
    counts: Counter[tuple[str, str]] = Counter()
    for finding in found:
        counts[finding.kind, finding.place] += finding.count
    return dict(counts)


def listed(name: str = "*") -> dict[tuple[str, str], int]:
    """Returns what the lists still allow."""
    rows = [
        line.split("\t")
        for path in sorted(LEFT.glob(f"{name}.txt"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    return {(kind, place): int(count) for kind, count, place in rows}


HEADER = """\
# Places of this room that break the rules of tests/support/wording.py. The list only gets shorter:
# mend a place, run `python tests/support/wording.py --shrink`, and commit this file with it. After a conflict
# take either side and run it. `python tests/support/wording.py PATH` prints the findings below PATH.
"""


def shrink(first: bool = False) -> None:
    """Lowers the lists to what is still found; with first=True writes them anew."""
    now, before = counted(look_over()), listed()
    rows = {k: n if first else min(n, before[k]) for k, n in now.items() if first or k in before}
    for path in LEFT.glob("*.txt"):
        path.unlink()
    LEFT.mkdir(exist_ok=True)
    by_room: dict[str, list[str]] = {}
    for (kind, place), count in sorted(rows.items(), key=lambda row: (row[0][1], row[0][0])):
        by_room.setdefault(room(place), []).append(f"{kind}\t{count}\t{place}\n")
    for name, lines in by_room.items():
        (LEFT / f"{name}.txt").write_text(HEADER + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] in (["--shrink"], ["--first"]):
        shrink(first=words[0] == "--first")
    else:
        for finding in look_over():
            if not words or any(finding.place.startswith(word) for word in words):
                print(f"{finding.place}:{finding.line}: {finding.kind}: {finding.text}")
