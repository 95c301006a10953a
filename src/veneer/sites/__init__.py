"""A layer is a matrix: the kinds of layer that can be adapted, and how they are found."""

from veneer.sites.base import Site
from veneer.sites.find import find, site_for
from veneer.sites.leaf import LeafSite

__all__ = ["LeafSite", "Site", "find", "site_for"]
