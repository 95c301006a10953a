"""`veneer analyse`: ranks, energies and intruders of an adapter, likeness of two, exact changes of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

from veneer.adapt.combine import to_lora
from veneer.adapt.store import store
from veneer.adapt.store.folder import adapter_folder
from veneer.analyse.intruders import intruders, scale_intruders
from veneer.analyse.likeness import likeness
from veneer.analyse.profiles import profiles
from veneer.analyse.spectra import spectra
from veneer.errors import ConfigError, NotMergeable, option
from veneer.files import check_new
from veneer.models import adapted
from veneer.sites.roles import plays
from veneer.tasks import DEFAULT
from veneer.train.folder import task_record
from veneer.train.loop.progress import Voice
from veneer.verbs.eval.evaluate import evaluate

NEW, VALUES = "analysed", 16  # singular values of a layer that are kept for the record


@dataclass(frozen=True)
class Analysis:
    """One adapter, layer by layer, its likeness to others, and scores before and after a change of it.

    likeness: by the other's name; changed: the new adapter's folder and the way it was made; scores: lines of
    `veneer eval`.
    """

    name: str
    folder: str
    base: str
    layers: list[dict[str, Any]]
    roles: dict[str, float]
    likeness: dict[str, list[dict[str, Any]]]
    changed: dict[str, Any] | None
    scores: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def analyse(
    adapter: Sequence[str],
    *,
    model: str | None = None,
    k: int = 10,
    threshold: float = 0.5,
    scale: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    out: str | None = None,
    data: Sequence[str] = (),
    seed: int = 0,
    allow: Sequence[str] = (),
    progress: bool = True,
) -> Analysis:
    """Returns ranks, shares of norm and intruder dimensions of the first adapter, and its likeness to others.

    adapter: FOLDER or NAME=FOLDER; further ones are compared with the first
    model: base model [the one the adapters were made for]
    k: leading directions of each layer in which intruders are counted
    threshold: a direction is an intruder if its cosine with every one of the base's is below
    scale: multiply intruders by this number from 0 to 1 and save the exact result in out
    rank: cut each layer to this rank and save the result in out
    energy: cut each layer to this share of its squared norm and save the result in out
    out: folder of the changed adapter, which must not exist
    data: texts that measure the changed adapter beside the first, as of veneer eval; repeatable
    seed: seed of the search for leading directions
    allow: problems to let through when loading, see veneer.load
    """
    _check(scale, rank, energy, out, data)
    opened, wanted = adapted.open_all(adapter, model=model, allow=allow)
    first, *others = (w.name for w in wanted)
    layers = _layers(opened.model, first, k, threshold, seed)
    changed = None
    if out is not None:
        changed = {
            "folder": out,
            **_changed(opened.model, first, (scale, rank, energy), (k, threshold, seed)),
        }
        store.save(opened.model, out, NEW)
        task_record.write(Path(out), *task_record.read(adapter_folder(wanted[0].folder)))
    return Analysis(
        name=first,
        folder=str(wanted[0].folder),
        base=opened.base,
        layers=layers,
        roles=_roles(layers),
        likeness={o: [one.as_dict() for one in likeness(opened.model, first, o)] for o in others},
        changed=changed,
        scores=_scores(opened.base, wanted[0], out, data, allow, Voice(progress)) if out and data else None,
    )


def _check(
    scale: float | None, rank: int | None, energy: float | None, out: str | None, data: Sequence[str]
) -> None:
    ways = {"scale": scale, "rank": rank, "energy": energy}
    given = [name for name, value in ways.items() if value is not None]
    if scale is not None and len(given) > 1:
        raise ConfigError(f"{option('scale')} and a cut are two steps; give one of them, then the other")
    if given and out is None:
        raise ConfigError(f"{option(given[0])} makes a new adapter; name its folder by {option('out')}")
    if out is not None and not given:
        ways_in_words = " or ".join(option(name) for name in ways)
        raise ConfigError(f"{option('out')} needs a change to save; give {ways_in_words}")
    if data and out is None:
        raise ConfigError(
            f"{option('data')} measures a changed adapter; give {option('out')}, or veneer eval"
        )
    if out is not None:
        check_new(out)


def _layers(model: nn.Module, name: str, k: int, threshold: float, seed: int) -> list[dict[str, Any]]:
    """Returns each layer's spectrum, share of the squared norm, profile, and intruders if its change is a
    matrix.
    """
    found = spectra(model, name)
    total = sum(s.norm**2 for s in found)
    try:
        counted = {i.site: i for i in intruders(model, name, k=k, threshold=threshold, seed=seed)}
    except NotMergeable:  # some layer's change has another form than a matrix
        counted = {}
    seen = {p.site: p.as_dict() for p in profiles(model, name, k=k, seed=seed)}
    return [
        {
            **s.as_dict(),
            "profile": seen.get(s.site),
            "values": s.values[:VALUES],
            "share": s.norm**2 / total if total else 0.0,
            "intruders": counted[s.site].count if s.site in counted else None,
        }
        for s in found
    ]


def _roles(layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the share of the squared norm in attention, in MLP and elsewhere."""
    found = {"attention": 0.0, "mlp": 0.0, "elsewhere": 0.0}
    for layer in layers:
        role = next((r for r in ("attention", "mlp") if plays(layer["site"], r)), "elsewhere")
        found[role] += layer["share"]
    return found


def _changed(
    model: nn.Module,
    name: str,
    ways: tuple[float | None, int | None, float | None],
    looking: tuple[int, float, int],
) -> dict[str, Any]:
    """Attaches the changed adapter as NEW and returns how it was made."""
    scale, rank, energy = ways
    k, threshold, seed = looking
    if scale is not None:
        n = scale_intruders(model, name, NEW, scale, k=k, threshold=threshold, seed=seed)
        return {"scale": scale, "intruders": n}
    cuts = to_lora(model, name, NEW, rank=rank, energy=energy)
    lost = mean(c.error**2 for c in cuts)
    return {"rank": rank, "energy": energy, "ranks": {c.site: c.rank for c in cuts}, "lost_energy": lost}


def _scores(
    base: str, first: adapted.Wanted, out: str, data: Sequence[str], allow: Sequence[str], voice: Voice
) -> dict[str, Any]:
    task, _ = task_record.read(adapter_folder(first.folder))
    adapters = [f"before={first.folder}", f"after={out}"]
    found = evaluate(
        base, adapter=adapters, data=data, task=task or DEFAULT, allow=allow, progress=voice.aloud
    )
    return found.as_dict()


def text(found: Analysis) -> str:
    """Returns the analysis as tables for people."""
    head = f"{'layer':<44} {'rank':>5} {'effective':>9} {'for 90 %':>8} {'share':>7} {'intruders':>9}"
    lines = [f"{found.name} on {found.base}", "", head]
    lines += [_line(layer) for layer in found.layers]
    shares = ", ".join(f"{role} {share:.0%}" for role, share in found.roles.items() if share)
    lines += ["", f"squared norm: {shares}; intruder dimensions: {_total(found.layers)}"]
    lines += _profile(found.layers)
    for other, rows in found.likeness.items():
        cosine, outputs, inputs = (mean(r[key] for r in rows) for key in ("cosine", "outputs", "inputs"))
        shared = f"outputs {outputs:.0%}, inputs {inputs:.0%}"
        lines.append(f"likeness to {other}: mean cosine {cosine:+.3f}, shared spaces: {shared}")
    if found.changed is not None:
        lines.append(_change(found.changed))
    for row in (found.scores or {}).get("lines", []):
        own = row["adapters"]
        before, after = own["before"]["value"], own["after"]["value"]
        lines.append(
            f"{row['name']}, {row['metric']}: base {row['base']:.4f}, before {before:.4f}, after {after:.4f}"
        )
    return "\n".join(lines)


def _line(layer: Mapping[str, Any]) -> str:
    ranks = f"{layer['rank']:>5} {layer['effective_rank']:>9.1f} {layer['energy_rank']:>8}"
    count = "–" if layer["intruders"] is None else layer["intruders"]
    return f"{layer['site'][-44:]:<44} {ranks} {layer['share']:>7.1%} {count:>9}"


def _profile(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line on the base's leading directions: what the change adds there, and at which angle."""
    seen = [layer["profile"] for layer in layers if layer["profile"] and layer["profile"]["outputs"]]
    if not seen:
        return []
    kept = mean(mean(p["retention"]) / mean(p["values"]) for p in seen if sum(p["values"]))
    angle = mean(min(p["outputs"]) for p in seen)
    turned = mean(mean(p["cosines"]) for p in seen)
    return [
        f"leading directions of the base: values change by {kept:.1%} in the mean, cosine {turned:.3f} to"
        f" those of the tuned layer; the change begins {angle:.0f} degrees away; stable rank"
        f" {mean(p['stable_rank'] for p in seen):.1f}"
    ]


def _total(layers: Sequence[Mapping[str, Any]]) -> str:
    counts = [layer["intruders"] for layer in layers if layer["intruders"] is not None]
    return str(sum(counts)) if counts else "not counted: some change has no matrix"


def _change(changed: Mapping[str, Any]) -> str:
    if "intruders" in changed:
        how = f"{changed['intruders']} intruders times {changed['scale']:g}, exactly"
    else:
        ranks = changed["ranks"].values()
        how = f"ranks {min(ranks)} to {max(ranks)}, {changed['lost_energy']:.2%} of the energy left out"
    return f"saved in {changed['folder']}: {how}"
