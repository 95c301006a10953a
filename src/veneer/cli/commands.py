"""The command line's verbs by name, and the app that finds them. No verb is loaded before it is called."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from veneer.cli.words import WORDS, Debug


class Verb(NamedTuple):
    """What --help says of a verb; what it does stands in verbs.py under its name."""

    help: str
    examples: tuple[str, ...]


VERBS = {
    "combine": Verb(
        "Make one plain LoRA adapter of several, weighted, or cut one to a lower rank, and say what that lost.",
        (
            "veneer combine runs/a@0.7 runs/b@0.3 --out mixed --rank 16",
            "veneer combine runs/a --out small --energy 0.9",
            "veneer combine runs/a runs/b --out mixed --how ties --rank 32",
        ),
    ),
    "convert": Verb(
        "Carry an adapter between PEFT, kohya, diffusers, torchtune, mlx-lm, LitGPT and vLLM, and say what was rounded.",
        (
            "veneer convert runs/notes --to vllm --out served",
            "veneer convert lora.safetensors --model ./llama --out adapter",
        ),
    ),
    "convert-config": Verb(
        "Translate a run's settings from axolotl, LLaMA-Factory, torchtune or mlx-lm, with a list of what could not be carried.",
        (
            "veneer convert-config axolotl.yml --out run.yaml",
            "veneer convert-config sft.yaml --tool llamafactory --json",
        ),
    ),
    "data": Verb(
        "Show texts as tokens with what is learned of them, or check them: counts, lengths, leaks; exit code 3 if something is wrong.",
        (
            "veneer data show chats.jsonl --model ./llama",
            "veneer data check chats.jsonl --valid held_out.jsonl --length 512",
        ),
    ),
    "demo": Verb(
        "Adapt the built-in model in three ways and show what each learned and forgot; a few minutes, no download.",
        ("veneer demo", "veneer demo --steps 20 --out runs/short"),
    ),
    "doctor": Verb(
        "Show what this machine and this installation have, and what is missing for which feature; exit code 3 if the core is broken.",
        ("veneer doctor", "veneer doctor --json"),
    ),
    "eval": Verb(
        "Measure a base and its adapters on texts and lm-eval's benchmarks, side by side; exit code 3 for a benchmark there is none of.",
        (
            "veneer eval builtin --adapter runs/notes --data builtin:prose --data builtin:known",
            "veneer eval ./llama --adapter runs/a --adapter runs/b@0.75 --data held_out.jsonl --tasks arc_easy --json",
            "veneer eval ./llama --tasks my_task --task-folder ./tasks",
        ),
    ),
    "export": Verb(
        "Write base and adapters as one Hugging Face folder in any number format; exit code 3, and nothing saved, if that would lose them.",
        (
            "veneer export ./llama --adapter runs/notes --out exported --dtype fp16",
            "veneer export builtin --adapter runs/a@0.5 --adapter runs/b --out exported --shard-size 500MB",
        ),
    ),
    "extract": Verb(
        "Make a LoRA adapter of what a fine-tuned model changed in its base.",
        (
            "veneer extract ./tuned --base ./llama --out adapter --rank 32",
            "veneer extract ./tuned --base ./llama --out adapter --energy 0.9",
        ),
    ),
    "fit": Verb(
        "Adapt a model to texts, by full fine-tuning or any method, and measure what was learned and forgotten.",
        (
            "veneer fit --data notes.txt --out runs/notes",
            "veneer fit --model ./llama --data chats.jsonl --method dora --rank 16 --lr 2e-4",
            "veneer fit --config run.yaml --steps 500",
        ),
    ),
    "fit-many": Verb(
        "Train the runs of several files side by side on one base, in one pass a step; each becomes what it would be alone.",
        (
            "veneer fit-many french.yaml formal.yaml",
            "veneer fit-many runs/*.yaml --model ./llama --steps 500",
        ),
    ),
    "generate": Verb(
        "Continue a prompt by the base model and by adapters, side by side.",
        (
            'veneer generate "def area(" --adapter runs/notes',
            'veneer generate "The statement" --adapter runs/a --adapter runs/b@0.5 --tokens 100',
        ),
    ),
    "inspect": Verb(
        "Show what an adapter changes, layer by layer, and whether it would survive a merge.",
        ("veneer inspect runs/notes", "veneer inspect runs/notes --json"),
    ),
    "merge": Verb(
        "Write adapters into a copy of their base model; exit code 3, and nothing saved, if rounding would lose them.",
        (
            "veneer merge runs/notes --out merged",
            "veneer merge runs/a@0.5 runs/b --out merged --dtype float32",
        ),
    ),
    "plan": Verb(
        "Say what a training would take in memory and time, and what would halve it; exit code 3 if it will not fit.",
        (
            "veneer plan --data notes.txt",
            "veneer plan --model ./llama --data chats.jsonl --method dora --rank 16",
            "veneer plan --config run.yaml --no-probe --json",
        ),
    ),
    "report": Verb(
        "Write the page that tells a finished run, report.html, from the files in its folder.",
        ("veneer report runs/notes", 'veneer report runs/notes --measure --prompt "def area("'),
    ),
    "methods": Verb(
        "List methods, starts and optimisers, with options and papers.",
        ("veneer methods", "veneer methods lora --json"),
    ),
    "verify": Verb(
        "Prove that an adapter is complete, loads on its base and has effect; exit code 3 when not.",
        ("veneer verify runs/notes", "veneer verify adapter --model ./llama --dtype bfloat16"),
    ),
}


class Verbs(TyperGroup):
    """A group whose verbs are made only when one is called; --help lists them from the table."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else command(name), rest


def command(name: str) -> Any:
    """The verb with all its flags."""
    from veneer.cli import verbs

    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    epilog = "\n\n".join(["Examples:", *VERBS[name].examples])
    alone.command(name, help=VERBS[name].help, epilog=epilog, context_settings=WORDS)(
        getattr(verbs, name.replace("-", "_"))()
    )
    return typer.main.get_command(alone)


def _print_version(value: bool) -> None:
    if value:
        from veneer.version import __version__

        print(f"veneer {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
]

app = typer.Typer(cls=Verbs, add_completion=False, pretty_exceptions_enable=False, context_settings=WORDS)


@app.callback(
    invoke_without_command=True, epilog="veneer VERB --help shows the flags of a verb, with examples."
)
def veneer(ctx: typer.Context, version: Version = False, debug: Debug = False) -> None:
    """Thin low-rank layers over large models: adapt, train, merge, and see what was learned and forgotten."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(2)


def _listed() -> None:
    raise AssertionError("stands in the list of verbs only; command() makes what is called")


for _name, _verb in VERBS.items():
    app.command(_name, help=_verb.help)(_listed)
