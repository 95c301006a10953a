"""Finds the leading parts of several weights of one shape at once, for starts like PiSSA's."""

from __future__ import annotations

from typing import Any

from veneer.methods import Delta, Stats, inits, options_of, takes_stats
from veneer.methods.base.delta import master_dtype
from veneer.methods.base.options import option
from veneer.ops.draws import keyed
from veneer.ops.matrix.linalg import leading_svds
from veneer.ops.matrix.sketch import Svd
from veneer.sites import Site

# Numbers of all matrices in one stack, which takes 6 bytes for each meanwhile: 6 MB on a CPU, 0.8 GB on a
# GPU. Measured on a CPU with AMX at rank 16, seconds of one by one over those of a stack: 1.65 for 16
# matrices of width 128, 1.15 for 16 of 256 and 1.18 for 4 of 512, all of which are stacked; 0.77 for 4 of
# 1024 and 0.62 for 4 of 2048, where the copy costs more than the calls that it saves, and which are not. On a
# GPU it has not been measured.
AT_ONCE = {"cpu": 2**20, "cuda": 2**27}


class Ahead:
    """Yields Stats for the deltas of `kind` site by site; parts found with the first of a stack wait here."""

    def __init__(self, kind: type[Delta], sites: list[Site], options: list[dict[str, Any]]) -> None:
        self._sites = sites
        self._found: dict[int, Svd] = {}
        self._alike: dict[
            tuple[Any, ...], list[int]
        ] = {}  # what still has to be found, by what may be stacked
        self._keys = [_key(kind, *pair) for pair in zip(sites, options, strict=True)]
        pairs = zip(options, self._keys, strict=True)
        self._seeds: list[Any] = [option(kind, "seed", own) if key else None for own, key in pairs]
        for i, key in enumerate(self._keys):
            if key:
                self._alike.setdefault(key, []).append(i)

    def of(self, i: int, known: Stats | None) -> Stats | None:
        """Returns the known Stats of the i-th site, with the leading part of its weight if its start needs
        it.
        """
        key = self._keys[i]
        if key is None:
            return known
        if i not in self._found:
            self._find(key)
        return (known or Stats())._replace(leading=self._found.pop(i))

    def _find(self, key: tuple[Any, ...]) -> None:
        rank, _, out, in_, device = key
        n = max(1, AT_ONCE.get(device.type, 0) // (out * in_))
        now, self._alike[key] = self._alike[key][:n], self._alike[key][n:]
        sites = [self._sites[i] for i in now]
        weights = [s.weight().detach().to(master_dtype(s)) for s in sites]
        draws = [keyed(self._seeds[i], self._sites[i].key) for i in now]
        self._found.update(zip(now, (Svd(*t) for t in leading_svds(weights, rank, draws)), strict=True))


def _key(kind: type[Delta], site: Site, options: dict[str, Any]) -> tuple[Any, ...] | None:
    """Returns rank, dtype, shape and device, or None if the start needs no leading part or it cannot be
    found.
    """
    asks = (
        takes_stats(kind)
        and "init" in options_of(kind)
        and inits.needs(option(kind, "init", options)).leading
    )
    if not asks or site.device.type == "meta":
        return None
    rank = option(kind, "rank", options)
    fits = isinstance(rank, int) and 1 <= rank <= min(
        site.out, site.in_
    )  # else the change itself says what is wrong
    return (rank, master_dtype(site), site.out, site.in_, site.device) if fits else None
