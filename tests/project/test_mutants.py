"""The tool that plants faults: its operators, its draw, and that a fault in a real module is noticed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from mutants import __main__ as command  # noqa: E402
from mutants import aside, faults, journal, nearness, noticing, pool  # noqa: E402
from mutants.operators import OPERATORS  # noqa: E402

BY_HAND = [
    ("sign", "y = a + b", ["y = a - b"]),
    ("sign", "y -= f(-x)", ["y += f(-x)", "y -= f(x)"]),
    ("sign", "y = 'a' + b + [c]", []),
    ("transpose", "y = A.mT @ B", ["y = A @ B", "y = A.mT @ B.mT"]),
    ("transpose", "y = A.t()", ["y = A"]),
    ("term", "y = a - b", ["y = a", "y = -b"]),
    ("term", "y = a and b and c", ["y = b and c", "y = a and c", "y = a and b"]),
    ("scale", "y = a * b", ["y = a", "y = b", "y = a / b"]),
    (
        "scale",
        "y = (a / 0.5) ** n",
        ["y = a / 0.5", "y = a ** n", "y = (a * 0.5) ** n", "y = (a / 1.0) ** n"],
    ),
    ("scale", "y = x.square().sum() + len(folder / NAME)", ["y = x.sum() + len(folder / NAME)"]),
    ("off-by-one", "y = x[:r, 0]", ["y = x[:r + 1, 0]", "y = x[:r - 1, 0]", "y = x[:r, 1]", "y = x[:r, -1]"]),
    ("off-by-one", "for i in range(n): pass", ["for i in range(n + 1):", "for i in range(n - 1):"]),
    ("swap", "y = f(a, b, c) - d", ["y = d - f(a, b, c)", "y = f(b, a, c) - d"]),
    ("swap", "y = isinstance(a, b) or max(a, b) or f(*a, b)", []),
    ("comparison", "y = 0 <= a < 1", ["y = 0 < a < 1", "y = 0 <= a <= 1"]),
    (
        "comparison",
        "y = [a is None, b not in c]",
        ["y = [a is not None, b not in c]", "y = [a is None, b in c]"],
    ),
    ("condition", "if not a: f()", ["if a:"]),
    ("condition", "y = [a if b else c for d in e if f or g]", None),
    ("truth", "y = f(a, b=True)", ["y = f(a, b=False)"]),
    ("extreme", "y = min(a) + x.any()", ["y = max(a) + x.any()", "y = min(a) + x.all()"]),
    ("statement", "f(x)", ["pass"]),
    ("statement", "y += 1", ["pass"]),
]


def found(source: str, operator: str = "") -> list[faults.Fault]:
    return [f for f in faults.of("methods/some.py", source) if operator in ("", f.operator)]


@pytest.mark.parametrize(("operator", "source", "expected"), BY_HAND)
def test_an_operator_does_what_it_says(operator, source, expected):
    if expected is None:
        expected = [
            source.replace("if b", "if not b"),
            source.replace("if f or g", "if not (f or g)"),
            source.replace("f or g", "f and g"),
        ]
    assert sorted(f.becomes for f in found(source, operator)) == sorted(expected)


def test_every_operator_is_tried_by_hand():
    assert {operator for operator, *_ in BY_HAND} == set(OPERATORS)


def test_texts_types_and_checks_are_left_alone():
    source = '''
"""1 + 1"""
from __future__ import annotations
if TYPE_CHECKING:
    n = 1
def f(a: tuple[3, 4] | None) -> x[0]:
    """True"""
    assert a is not None
    zip(a, strict=True)
    raise ValueError(f"{1 + 1}" if a > 1 else b)
'''
    assert [f.becomes for f in found(source)] == ["pass"]


def test_the_default_of_an_argument_that_is_never_read_is_left_alone():
    source = "class A:\n    def f(self, a, b=1, *, c=2.0, d=(3,)):\n        return b + (lambda: d)()[0]\n"
    assert {f.becomes for f in found(source) if "def f" in f.becomes} == {
        "def f(self, a, b=2, *, c=2.0, d=(3,)):",
        "def f(self, a, b=0, *, c=2.0, d=(3,)):",
        "def f(self, a, b=1, *, c=2.0, d=(4,)):",
        "def f(self, a, b=1, *, c=2.0, d=(2,)):",
    }


def test_the_planted_source_has_the_fault_and_nothing_else():
    source = "def f(a, b):\n    # a comment\n    if a > b:\n        return a - b\n    return b - a\n"
    for fault in found(source):
        lines = ast.unparse(faults.plant(source, fault)).splitlines()
        before = ast.unparse(ast.parse(source)).splitlines()
        assert sum(a != b for a, b in zip(lines, before, strict=True)) == 1
        assert fault.becomes in [line.strip().removesuffix(":") for line in lines] or fault.becomes in [
            line.strip() for line in lines
        ]
        assert fault.was in source and fault.line in (3, 4, 5) and fault.where == "f"


def test_a_seed_draws_the_same_faults_whatever_is_written_beside_them():
    source = "def f(a, b):\n    return a * (a + b) - min(a, b)\n"
    area = {"methods/some.py": "methods"}

    def drawn(text: str, seed: int) -> list[tuple[str, ...]]:
        return [f.key for f in faults.sample(found(text), area, seed)]

    assert drawn(source, 0) == drawn(source, 0) != drawn(source, 1)
    assert sorted(drawn(source, 0)) == sorted(drawn(source, 1)) == sorted(f.key for f in found(source))
    longer = f"import os\n\ndef g(x):\n    return x - 1\n\n{source}"
    for operator in OPERATORS:
        assert [k for k in drawn(longer, 0) if k[1] == "f" and k[2] == operator] == [
            k for k in drawn(source, 0) if k[2] == operator
        ]


def test_the_first_faults_are_of_every_kind():
    found = [
        f
        for file in noticing.files()
        for f in faults.of(file, (faults.SOURCE / file).read_text(encoding="utf-8"))
    ]
    first = faults.sample(found, {f.file: noticing.area(f.file) for f in found}, 0)[:33]
    assert {(noticing.area(f.file), f.operator) for f in first} == {
        (a, o) for a in noticing.AREAS for o in OPERATORS
    }


def test_every_fault_set_aside_is_one_of_the_sources_and_has_a_reason(tmp_path):
    reasons = aside.load()
    sources = {file: (faults.SOURCE / file).read_text(encoding="utf-8") for file, *_ in reasons}
    assert aside.idle(reasons, [f for file, source in sources.items() for f in faults.of(file, source)]) == []
    fault = found("y = a + b")[0]
    assert aside.idle({fault.key: ("equivalent", "why")}, found("y = a + b")) == []
    assert aside.idle({fault.key: ("equivalent", "why")}, found("y = a + c")) == [
        "methods/some.py: sign in the module: y = a + b"
    ]
    entry = {
        "file": "a.py",
        "where": "f",
        "operator": "sign",
        "was": "a",
        "becomes": "b",
        "kind": "equivalent",
        "reason": "",
    }
    (tmp_path / "aside.json").write_text(json.dumps([entry]), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"aside.json: a.py: 'b' needs a reason and a kind, one of equivalent, unreachable"
    ):
        aside.load(tmp_path / "aside.json")


def test_every_file_has_tests_its_own_ones_first_and_a_new_one_too():
    for patterns in noticing.ROWS.values():
        assert all(list(noticing.TESTS.rglob(f"test_{pattern}.py")) for pattern in patterns.split())
    assert noticing.tests("methods/miss.py")[0] == "tests/methods/test_miss.py"
    assert noticing.tests("optim/lorapro/__init__.py")[0] == "tests/optim/test_lorapro.py"
    assert "tests/methods/test_methods.py" in noticing.tests("methods/added_tomorrow.py")
    assert noticing.tests("adapt/store/rounding.py")[0] == "tests/adapt/test_rounding.py"
    order = noticing.tests("adapt/attach.py", "_warn_of_experts")  # test_calls has a word of its message
    own = ["tests/adapt/test_attach.py", "tests/adapt/test_attach_rules.py"]
    assert sorted(order[:2]) == own and order[2] == "tests/adapt/test_calls.py"
    assert noticing.files(["src/veneer/optim/lorapro"]) == [
        f"optim/lorapro/{n}.py" for n in ("__init__", "factored", "forms")
    ]


def test_of_a_method_only_tests_that_name_it_run_and_of_what_all_share_every_one():
    own, other = (
        "tests/methods/test_methods.py::test_x[vera-linear]",
        "tests/methods/test_methods.py::test_x[miss-linear]",
    )
    assert noticing.concerns("methods/vera.py", own) and not noticing.concerns("methods/vera.py", other)
    assert noticing.concerns("methods/vera.py", "tests/methods/test_frozen.py::test_x") and noticing.concerns(
        "methods/lora.py", other
    )
    assert noticing.concerns("adapt/store/store.py", other)
    assert noticing.concerns("methods/base/turning.py", other)


def test_the_nearest_tests_run_first():
    fault = found("class RowNorms:\n    def factors(self):\n        return 1")[0]
    names = ("a.py::test_factors_of_row_norms[some]", "some.py::test_x", "a.py::test_it_compiles")
    near, far, slow = (f"tests/test_{name}" for name in names)
    assert nearness.words_of("methods/miss.py", "MiSS.from_peft") >= {"mini_r", "MiSS", "to_peft"}
    by_text = noticing.place(fault, far, test_the_nearest_tests_run_first)
    assert by_text < noticing.place(fault, far)  # this test names factors
    assert sorted([slow, far, near], key=lambda test: noticing.place(fault, test)) == [near, far, slow]


def test_a_fault_in_a_real_module_is_noticed_and_none_is_not(tmp_path):
    test = tmp_path / "test_files.py"
    test.write_text(
        "import hashlib, time\n"
        "from veneer import files\n"
        "class Nothing:\n"
        "    def read(self, n):\n"
        "        time.sleep(0.2)  # so that hanging takes no processor\n"
        "        return b''\n"
        "def test_blocks_of_nothing():\n"
        "    assert list(files.blocks(Nothing())) == []\n"
        "def test_sha256(tmp_path):\n"
        "    (tmp_path / 'f').write_bytes(b'abc')\n"
        "    assert files.sha256(tmp_path / 'f') == hashlib.sha256(b'abc').hexdigest()\n",
        encoding="utf-8",
    )
    script = (
        "import hypothesis, pytest, sys, safetensors.torch\n"
        "from mutants import faults, noticing, pool\n"
        "noticing.tests = lambda *_: [sys.argv[1]]\n"
        "source = (faults.SOURCE / 'files.py').read_text(encoding='utf-8')\n"
        "places = ('sha256', 'blocks', 'refuse_pickle')\n"
        "own = [f for f in faults.of('files.py', source) if f.where in places]\n"
        "own = {(f.where, f.operator): f for f in own}\n"
        "kinds = [('sha256', 'statement'), ('blocks', 'condition'), ('refuse_pickle', 'condition')]\n"
        "wanted = [own[kind] for kind in kinds]\n"
        "for fault, limit in zip(wanted, (60.0, float(sys.argv[2]), 60.0)):\n"
        "    for o in pool.outcomes([fault], jobs=1, limit=limit):\n"
        "        print(fault.where, fault.operator, o.how, o.test.rpartition('::')[2])\n"
        "print([o.how for o in pool.outcomes(wanted[1:2], jobs=1, limit=60.0, patience=0.1)])\n"
        "print(pool.fail_anyway([sys.argv[1] + '::test_sha256'], 60.0))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(test), "12"],  # seconds; a busy machine needs some
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "sha256 statement failed test_sha256",
        "blocks condition hung test_blocks_of_nothing",
        "refuse_pickle condition survived ",
        "['survived']",
        "[]",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test_files.py"]


def test_the_command_says_what_is_wrong_and_lists_without_planting(capsys):
    assert command.main(["--only", "src/veneer/adapt/nowhere.py"]) == 2
    assert "no faults found in src/veneer/adapt/nowhere.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--count", "0"])
    assert "--count, --jobs, --limit and --patience must be above 0" in capsys.readouterr().err
    assert command.main(["--only", "src/veneer/methods/miss.py", "--count", "2", "--list"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("src/veneer/methods/miss.py:") == 2 and shown.count("\n  + ") == 2


def test_a_round_over_all_faults_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    seen: list[tuple[str, ...]] = []

    def outcomes(plant, **_):
        for i, fault in enumerate(plant):
            seen.append(fault.key)
            yield pool.Outcome(fault, "survived" if i == 1 else "failed", 0.1, "tests/test_x.py::test_y")

    monkeypatch.setattr(pool, "outcomes", outcomes)
    monkeypatch.setattr(pool, "fail_anyway", lambda tests, limit: [])
    monkeypatch.setattr(pool, "LARGE", ())
    file, only = tmp_path / "round.jsonl", ["--only", "src/veneer/methods/miss.py"]
    given = ["--all", str(file), "--count", "4", *only]
    assert command.main(given) == 3  # one of four survived
    assert command.main([*given, "--lenient"]) == 0
    assert len(seen) == len(set(seen)) == 8
    said = capsys.readouterr().out
    line = json.loads(said.splitlines()[-1])
    assert line["tried"] == 8 and line["killed_share"] == 0.75 and line["left"] > 0
    assert said.count("SURVIVED SO FAR src/veneer/methods/miss.py") == 3  # one, then two

    file.write_text(file.read_text() + '{"fault": ["cut', encoding="utf-8")
    kept = journal.Journal(file)
    assert len(kept.how) == 8
    own = faults.of("methods/miss.py", (faults.SOURCE / "methods/miss.py").read_text(encoding="utf-8"))
    assert len(kept.survivors(own, ())) == 2
    assert len(kept.survivors(own, {seen[1]})) == 1  # set aside since
    assert not {f.key for f in kept.left(own, ())} & set(seen)
    assert kept.share(own, {seen[1]}) == (7, 1 - 1 / 7)


def test_the_commit_draws_a_seed_of_its_own():
    assert command.options(["--seed", "7"]).seed == 7
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    assert command.options(["--seed", "commit"]).seed == int(head[:8] or "0", 16)
