"""Recipe files -> one Recipe: extends, overrides, merge, and where each value came from.

A recipe is data: no import paths, no resolvers but references `${a.b}` and, under `data` and `run`,
`${oc.env:NAME}`. Each file and each override is scanned as a YAML node tree, which knows its lines,
then merged by OmegaConf, base first. Every fault is collected before any is raised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dsplugins.contracts import Problem, RecipeError
from dsplugins.recipe_merge import Reader, escaped, find, nearest_place, recipe_folder, settle
from dsplugins.recipe_scan import SECTIONS, shown_path


@dataclass(frozen=True)
class Recipe:
    """A recipe, merged with what it extends and with the command line; references are resolved."""

    path: Path
    """The file that was asked for."""
    sources: tuple[Path, ...]
    """Files read, base first."""
    sections: dict[str, dict[str, Any]]
    """Section -> its values, plain Python; every section is there, perhaps empty."""
    plugins: dict[str, dict[str, Any]]
    """Plugin -> its options, in the order in which they were first named."""
    removed: tuple[str, ...]
    """Plugins that were named and then removed by null."""
    overrides: tuple[str, ...] = ()
    """`key=value`, as on the command line."""
    given: str = field(default="", repr=False)
    """Text of `path`."""
    places: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Dotted key -> `file:line` or `command line`."""
    problems: tuple[Problem, ...] = ()
    """What is wrong although it could be merged; `plan.prepare` tells it with everything else."""

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe at `path`, or the shipped one of that name.

        Raises RecipeError with every problem where one of them leaves nothing to go on with: not YAML, a
        tag or an alias, an extends that leads nowhere. What else is wrong is in `problems`, and left out: a
        key given twice, a resolver, a reference that leads nowhere.
        """
        reader = Reader()
        file = find(Path(path), reader.problems)
        if file is not None:
            reader.read(file)
        for text in overrides:
            reader.override(text)
        merged = reader.merge()
        plugins, removed, sections = settle(merged, reader)
        if merged is None or file is None:
            raise RecipeError(reader.problems)
        given = reader.texts[file.resolve()]
        return Recipe(
            path=file,
            sources=tuple(reader.sources),
            sections=sections,
            plugins=plugins,
            removed=removed,
            overrides=tuple(overrides),
            given=given,
            places=reader.places,
            problems=tuple(reader.problems),
        )

    @property
    def name(self) -> str:
        """File name without ending."""
        return self.path.stem

    def place(self, key: str) -> str:
        """`file:line` or `command line` of a dotted key or of its nearest parent; "" if nobody wrote it."""
        return nearest_place(self.places, key)

    def located(self, problems: Iterable[Problem]) -> list[Problem]:
        """The problems with their places filled in: the key's, its parent's, or else the file."""
        top = f"{shown_path(self.path)}:1"
        return [p if p.place else replace(p, place=self.place(p.key) or top) for p in problems]

    def as_given(self) -> str:
        """The file's own text, with the command line's overrides as comments."""
        if not self.overrides:
            return self.given
        lines = ["# command line:", *("#   " + " ".join(text.splitlines()) for text in self.overrides)]
        return self.given.rstrip("\n") + "\n\n" + "\n".join(lines) + "\n"

    def resolved(self) -> str:
        """The merged recipe as YAML: no extends, no references, no removed plugins. Itself a recipe."""
        whole = {
            "plugins": self.plugins,
            **{name: values for name, values in self.sections.items() if values},
        }
        return OmegaConf.to_yaml(OmegaConf.create(escaped(whole)))


def render(problems: Iterable[Problem], ended: str = "Nothing was started.") -> str:
    """Problems as they are shown: place, message, remedy; then how many, and how it `ended`."""
    unique = list(dict.fromkeys(problems))
    lines = []
    for problem in unique:
        lines.append(f"{problem.place}: {problem.message}" if problem.place else problem.message)
        lines += [f"    {line}" for line in problem.remedy.splitlines()]
    lines.append(f"{len(unique)} problem{'' if len(unique) == 1 else 's'}. {ended}")
    return "\n".join(lines)


__all__ = ["SECTIONS", "Recipe", "recipe_folder", "render"]
