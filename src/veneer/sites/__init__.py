"""A layer is a matrix: the kinds of layer that can be adapted, and how they are found."""

from torch import nn

from veneer.sites.attention import AttentionSite
from veneer.sites.base import Site
from veneer.sites.bias import BiasSite
from veneer.sites.block import BlockSite
from veneer.sites.find import find
from veneer.sites.finding.kinds import site_for
from veneer.sites.leaf import LeafSite

__all__ = ["AttentionSite", "BiasSite", "BlockSite", "LeafSite", "Site", "find", "site_for", "site_of_kind"]

OTHERS: dict[str, type[Site]] = {kind.kind: kind for kind in (LeafSite, BiasSite, BlockSite, AttentionSite)}


def site_of_kind(kind: str, name: str, module: nn.Module) -> Site:
    """The site of a module that was of this kind when a file was written."""
    return OTHERS[kind](name, module) if kind in OTHERS else site_for(name, module)
