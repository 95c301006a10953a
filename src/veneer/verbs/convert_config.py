"""Translates a run configuration of another program into ours, and lists the settings left behind."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer import settings
from veneer.convert.base import of_model
from veneer.convert.settings import Translation, translate
from veneer.errors import ConfigError
from veneer.files import check_new, replacing
from veneer.models.pretrained import skeleton
from veneer.train.run import Run

ALSO = {"mlx-lm": "mlx", "llama-factory": "llamafactory"}  # other names of programs


@dataclass(frozen=True)
class Converted:
    """A translation. problems: settings that `veneer fit` will ask for before it runs the new file."""

    translation: Translation
    out: str | None
    problems: list[str]

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.translation),
            "uncarried": [u._asdict() for u in self.translation.uncarried],
            "out": self.out,
            "problems": self.problems,
        }


def convert_config(
    config: str, *, out: str | None = None, tool: str | None = None, model: str | None = None
) -> Converted:
    """Returns a configuration of another program as settings of `veneer fit`.

    config: YAML or JSON file
    out: new YAML file, with uncarried settings as comments; must not exist
    tool: axolotl, llamafactory, llamafactory-v1, torchtune, mlx-lm, trl, trl-dpo, .. or unsloth [detected]
    model: base model, for mlx-lm's files, which count its layers
    """
    path = Path(config)
    if not path.is_file():
        raise ConfigError(f"config: the file {path} does not exist")
    if out is not None:
        check_new(out)
    values = settings.read_yaml(path.read_text(encoding="utf-8"), str(path))  # JSON is YAML too
    layers = of_model(skeleton(model)).layers if model else None
    found = translate(values, ALSO.get(tool, tool) if tool else None, folder=path.parent, layers=layers)
    done = Converted(found, out, _problems(found.settings))
    if out is not None:
        with replacing(Path(out)) as (temporary,):
            temporary.write_text(yaml_text(done, path), encoding="utf-8")
    return done


def _problems(found: dict[str, Any]) -> list[str]:
    """Returns the problems of a Run with these settings."""
    try:
        Run.from_dict(found)
    except ConfigError as e:
        return str(e).splitlines()
    return []


def yaml_text(done: Converted, source: Path) -> str:
    """Returns the new file: comments with the uncarried settings, then one setting a line."""
    import yaml

    lines = [f"# made from {source.name} of {done.translation.tool}"]
    lines += [f"# {line}" for line in _remarks(done)]
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in done.translation.settings.items()}
    return "\n".join([*lines, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)])


def _remarks(done: Converted) -> list[str]:
    found = done.translation
    lines = [f"not carried: {u.key}: {u.value!r} ({u.why})" for u in found.uncarried]
    return [*lines, *(f"note: {n}" for n in found.notes), *(f"to do: {p}" for p in done.problems)]


def text(done: Converted) -> str:
    """Returns the translation for people."""
    found = done.translation
    where = f", in {done.out}" if done.out else ""
    return "\n".join(
        [
            f"{len(found.settings)} settings of {found.tool} carried{where}",
            *(f"- {line}" for line in _remarks(done)),
        ]
    )
