"""Plugins that stand in for others where a model is only built, never run: on the meta device, without a GPU.

A plugin whose parts need a library or a device to be constructed names another one of its slot, which
makes parts of the same shapes with neither: `stand_in = "torch_local"`. `dsplugins check` always builds with
it, whatever is installed, so that its answer is the same on every machine; a run never does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dsplugins.contracts import Problem, RecipeError
from dsplugins.manager import Chosen, Plugins, make
from dsplugins.offers import NoOffer, offers, resolve

if TYPE_CHECKING:
    from dsplugins.contracts import Plan, Settings


def substitute(plugins: Plugins) -> tuple[Plugins, Mapping[str, str]]:
    """The plugins with every `stand_in` in its owner's place, and {plugin: its stand-in}.

    Raises RecipeError for a stand-in that nobody offers in that slot, or that can't be made without options.
    """
    problems: list[Problem] = []
    chosen, substitutes = [], {}
    for item in plugins:
        name = getattr(item.plugin, "stand_in", None)
        replacement = item if name is None else _stand_in(item, name, problems)
        if replacement is not None and name is not None:
            substitutes[item.name] = name
        if replacement is not None:
            chosen.append(replacement)
    if problems:
        raise RecipeError(problems)
    return Plugins(chosen, substitutes.values()), substitutes


def objections(
    plugins: Plugins, substitutes: Mapping[str, str], plan: Plan, settings: Settings
) -> list[Problem]:
    """What stand-ins can't do although the recipe is right; `plugins` has them, `settings` are theirs."""
    problems = []
    replaced = {name: plugin for plugin, name in substitutes.items()}
    only = Plugins([item for item in plugins if item.name in replaced])
    for name, found in only.event("ds_check", plan=plan, settings=settings):
        for problem in found or ():
            said = f"stages can't be built with {name} in the place of {replaced[name]}: {problem.message}"
            remedy = "nothing else is wrong; a run doesn't use the stand-in"
            problems.append(Problem(said, f"plugins.{replaced[name]}", remedy, kind="environment"))
    return problems


def _stand_in(item: Chosen, name: str, problems: list[Problem]) -> Chosen | None:
    try:
        offer = resolve(name, [offer for offer in offers() if offer.slot == item.slot])
    except NoOffer as error:
        key = f"plugins.{item.name}"
        said = f"{key}: its stand_in {name!r} is not a plugin of the slot {item.slot}: {error}"
        problems.append(Problem(said, key, "tell its author"))
        return None
    return make(offer, {}, problems)


__all__ = ["objections", "substitute"]
