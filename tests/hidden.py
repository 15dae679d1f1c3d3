"""Packages that this process can't import, although they are installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any


class Without:
    """All finders as one, which finds nothing of some packages."""

    def __init__(self, packages: Sequence[str], finders: Sequence[Any]) -> None:
        self.packages, self.finders = packages, finders

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """None for what is hidden."""
        if name.split(".")[0] in self.packages:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *given: Any, **named: Any) -> Iterator[Any]:
        """Every installed one: plugins are looked up among them."""
        for finder in self.finders:
            if hasattr(finder, "find_distributions"):
                yield from finder.find_distributions(*given, **named)


def hide(*packages: str) -> None:
    """Before any of them is imported."""
    sys.meta_path[:] = [Without(packages, list(sys.meta_path))]
