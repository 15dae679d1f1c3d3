"""What installed packages offer: from metadata alone, and by which name a recipe means which of it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata

from dsplugins.contracts import SLOTS

OWN = "dsplugins"
"""This distribution's name."""
GROUP = "dsplugins."


@dataclass(frozen=True)
class Offer:
    """A plugin that some installed distribution offers; known from metadata alone."""

    name: str
    """In a recipe: the entry point's, or DISTRIBUTION/NAME where the recipe has it so."""
    slot: str
    """One of `contracts.SLOTS`, or `event`."""
    distribution: str
    version: str
    entry_point: metadata.EntryPoint


class NoOffer(LookupError):
    """Nobody offers a plugin of this name, or several do; `remedy` says what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        self.remedy = remedy
        super().__init__(message)


def offers() -> list[Offer]:
    """Every plugin that is installed, sorted by slot and name. Imports none of them."""
    found: list[Offer] = []
    known: dict[metadata.Distribution, tuple[str, str]] = {}
    installed = metadata.entry_points()  # reads every distribution's metadata: once, not once a slot
    for slot in (*SLOTS, "event"):
        for entry in installed.select(group=GROUP + slot):
            dist = entry.dist
            if dist and dist not in known:
                known[dist] = dist.name, dist.version  # each reads and parses a file
            found.append(Offer(entry.name, slot, *(known[dist] if dist else ("?", "?")), entry))
    return sorted(found, key=lambda offer: (offer.slot == "event", offer.slot, offer.name))


def resolve(name: str, everyone: Sequence[Offer]) -> Offer:
    """The offer that `name` means: DISTRIBUTION/NAME that one's, a bare name the only one.

    Where several packages offer a name, it means dsplugins' own, so that nothing that is installed changes
    what a recipe says. Raises NoOffer.
    """
    distribution, _, bare = name.rpartition("/")
    found = [offer for offer in everyone if offer.name == bare]
    if distribution:
        near = [offer for offer in found if _normal(offer.distribution) == _normal(distribution)]
        return replace(_one(name, near, everyone), name=name)
    own = [offer for offer in found if offer.distribution == OWN]
    return _one(name, own or found, everyone)


def qualified(offer: Offer) -> str:
    """`DISTRIBUTION/NAME`, which means this offer whoever else has the name."""
    return f"{_normal(offer.distribution)}/{offer.name}"


def _one(name: str, found: Sequence[Offer], everyone: Sequence[Offer]) -> Offer:
    if len(found) == 1:
        return found[0]
    if not found:
        near = difflib.get_close_matches(name, [offer.name for offer in everyone], n=1)
        remedy = f"did you mean {near[0]}? " if near else ""
        remedy += "A plugin of somebody else's must be installed first: pip install PACKAGE"
        raise NoOffer("no installed package offers a plugin of this name", remedy)
    names = list(dict.fromkeys(map(qualified, found)))
    sources = ", ".join(f"{offer.distribution} ({offer.slot})" for offer in found)
    remedy = f"write {' or '.join(names)}" if len(names) == len(found) else "uninstall all of them but one"
    raise NoOffer(f"offered {len(found)} times: {sources}", remedy)


def _normal(distribution: str) -> str:
    """As the package index compares names; without dots, which would split a recipe's key."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


__all__ = ["GROUP", "OWN", "NoOffer", "Offer", "offers", "qualified", "resolve"]
