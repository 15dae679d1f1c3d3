"""Entry points -> chosen plugins: found, imported, checked and registered, in recipe order.

Only plugins that the recipe names are imported. Order, ownership and versions are settled here,
never by the order of registration.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any

import pluggy
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from dsplugins import given, hookspecs
from dsplugins.contracts import CONTRACT, SLOTS, Problem, RecipeError
from dsplugins.environment import contradictions
from dsplugins.failures import HookFailure
from dsplugins.offers import GROUP, OWN, NoOffer, Offer, offers, qualified, resolve
from dsplugins.sources import source
from dsplugins.typed import build

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsplugins.recipe import Recipe

REQUIRED = ("platform", "model", "backend", "precision", "attention", "schedule", "optimizer", "data")
REQUIRED_BY_MOE = ("router", "experts", "dispatcher")


@dataclass(frozen=True)
class Chosen:
    """A plugin of this run: the object, its options, and where it came from."""

    offer: Offer
    plugin: object
    options: Any

    @property
    def name(self) -> str:
        """Name in the recipe."""
        return self.offer.name

    @property
    def slot(self) -> str:
        """Slot it owns, or `event`."""
        return self.offer.slot


class Plugins:
    """The chosen plugins, in recipe order, behind pluggy's checks."""

    def __init__(self, chosen: Sequence[Chosen], stand_ins: Collection[str] = ()) -> None:
        self.chosen = tuple(chosen)
        self.stand_ins = frozenset(stand_ins)
        """Those that the recipe doesn't name, see `dsplugins.stand_ins`; empty in a run."""
        self._manager = pluggy.PluginManager("dsplugins")
        self._manager.add_hookspecs(hookspecs)
        # pluggy calls the last one registered first.
        for item in reversed(self.chosen):
            self._manager.register(item.plugin, item.name)
        self._manager.check_pending()

    def __iter__(self) -> Iterator[Chosen]:
        return iter(self.chosen)

    @property
    def slots(self) -> dict[str, str]:
        """Slot -> name of its owner."""
        return {item.slot: item.name for item in self.chosen if item.slot != "event"}

    def owner(self, slot: str) -> Chosen | None:
        """The plugin that owns `slot`, if any."""
        return next((item for item in self.chosen if item.slot == slot), None)

    def slot(self, slot: str, **arguments: Any) -> Any:
        """Ask the owner of `slot` for its part. Raises HookFailure naming it when it fails, or gives None or
        what can't be one (`dsplugins.given`)."""
        results = list(self._call(f"ds_{slot}", arguments))
        if not results or results[0][1] is None:
            owner = self.slots.get(slot, "nobody")
            raise HookFailure(owner, f"ds_{slot}", TypeError("returned None"))
        return results[0][1]

    def event(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        """Call every listener of an event, in recipe order: [(plugin name, what it returned)].

        Raises HookFailure naming the one that fails, or returns what the event can't take.
        """
        return list(self._call(hook, arguments))

    def listens(self, hook: str) -> bool:
        """Whether any chosen plugin fills this hook."""
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def _call(self, hook: str, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            named = {name: arguments[name] for name in implementation.argnames}
            try:
                result = given.look(hook, implementation.function(**named))
            except (RecipeError, HookFailure):
                raise
            except Exception as error:
                from dsplugins.contracts import EnvironmentUnfit

                if isinstance(error, EnvironmentUnfit):
                    raise
                begins = _begins(implementation.function)
                raise HookFailure(implementation.plugin_name, hook, error, begins) from error
            yield implementation.plugin_name, result

    def lock(self) -> list[dict[str, Any]]:
        """What `plugins.lock.json` holds: name, slot, distribution, version, class, options and source."""
        return [{**entry, "source": source(entry["distribution"])} for entry in self._entries()]

    def _entries(self) -> list[dict[str, Any]]:
        return [
            {
                "name": item.name,
                "slot": item.slot,
                "distribution": item.offer.distribution,
                "version": item.offer.version,
                "class": item.offer.entry_point.value,
                "options": _plain(item.options),
            }
            for item in self.chosen
        ]

    def guests(self) -> list[str]:
        """Those that other packages offer: `router first_come (first-come 0.1)`."""
        return [
            f"{item.slot} {item.name} ({item.offer.distribution} {item.offer.version})"
            for item in self.chosen
            if item.offer.distribution != OWN
        ]

    def digest(self) -> str:
        """Hash of the lock: equal on ranks that resolved the same plugins with the same options.

        Without sources, for which each of thousands of ranks would ask git.
        """
        return hashlib.sha256(json.dumps(self._entries(), sort_keys=True, default=str).encode()).hexdigest()


def _begins(function: Any) -> str:
    """FILE:LINE of a hook, empty where it is no function of Python's."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else ""


def choose(recipe: Recipe) -> Plugins:
    """The plugins that a recipe names.

    Raises RecipeError with every problem found: a name nobody offers, one that can't be imported, bad
    options, a slot filled twice or left empty, a contract that doesn't fit.
    """
    everyone = offers()
    problems: list[Problem] = []
    chosen: list[Chosen] = []
    for name, values in recipe.plugins.items():
        try:
            item = make(resolve(name, everyone), values, problems)
        except NoOffer as error:
            key = f"plugins.{name}"
            problems.append(Problem(f"{key}: {error}", key, error.remedy))
        else:
            chosen += [item] if item else []
    failed = {p.key.split(".")[1] for p in problems if p.key.startswith("plugins.")}
    problems += _ownership(chosen)
    # A plugin that was named but is broken is one problem, not two.
    broken = {offer.slot for offer in everyone if not failed.isdisjoint((offer.name, qualified(offer)))}
    empty = [slot for slot in _empty_slots(recipe, chosen) if slot not in broken]
    for slot in empty:
        problems.append(Problem(f"slot {slot} is empty", "plugins", _fill(slot, everyone)))
    problems += _declarations(chosen, everyone, failed.union(broken, empty))
    if problems:
        raise RecipeError(problems)
    return Plugins(chosen)


def make(offer: Offer, values: Mapping[str, Any], problems: list[Problem]) -> Chosen | None:
    """The plugin with its options; None, and what is wrong in `problems`, if it can't be had."""
    key = f"plugins.{offer.name}"
    try:
        cls = offer.entry_point.load()
    except Exception as error:
        said = f"{key}: {offer.distribution} can't be imported: {type(error).__name__}: {error}"
        problems.append(Problem(said, key, f"mend or reinstall {offer.distribution}"))
        return None
    faults = _contract_faults(cls, key)
    options = None
    option_class = getattr(cls, "Options", None)
    if option_class is not None and not is_dataclass(option_class):
        faults.append(Problem(f"{key}: its Options is not a dataclass", key, "tell its author"))
    elif option_class is not None:
        options, bad = build(option_class, values, key, offer.name)
        faults += bad
    elif values:
        faults += [
            Problem(f"{key}.{k}: {offer.name} takes no options", f"{key}.{k}", "drop it") for k in values
        ]
    problems += faults
    if faults:
        return None
    try:
        plugin = cls(options) if option_class is not None else cls()
    except Exception as error:
        said = f"{key}: could not be made: {type(error).__name__}: {error}"
        bare = "a class without Options is made without arguments: declare them, or take none"
        problems.append(Problem(said, key, "check its options" if option_class is not None else bare))
        return None
    bad_hooks = list(_hook_faults(offer, plugin))
    problems += bad_hooks
    return None if bad_hooks else Chosen(offer, plugin, options)


def _contract_faults(cls: type, key: str) -> list[Problem]:
    wanted = getattr(cls, "contract", None)
    if wanted is None:  # written against the first one, as far as anybody can know
        wanted = ">=1.0,<2"
    version = ".".join(map(str, CONTRACT))
    try:
        fits = SpecifierSet(wanted).contains(version)
    except InvalidSpecifier:
        return [Problem(f"{key}: {wanted!r} is not a version specifier", key, "tell its author")]
    if fits:
        return []
    said = f"{key}: needs the plugin contract {wanted}, this dsplugins has {version}"
    return [Problem(said, key, "install versions of both that fit")]


def _hook_faults(offer: Offer, plugin: object) -> Iterable[Problem]:
    """Only known hooks, marked, the right arguments, the slot's hook and no other slot's, no ordering."""
    key = f"plugins.{offer.name}"
    filled = dict(_implementations(plugin))
    unmarked = [name for name in dir(type(plugin)) if name.startswith("ds_") and name not in filled]
    for name in unmarked:
        said = f"{key}: {name} isn't marked as a hook, and would never be called"
        yield Problem(said, key, "put @hookimpl, of dsplugins.hookspecs, above it")
    if not filled and not unmarked and offer.slot == "event":
        yield Problem(f"{key}: fills no hook", key, "tell its author: docs/reference/hooks.md lists them")
    slot_hooks = {f"ds_{slot}" for slot in SLOTS}
    own = f"ds_{offer.slot}"
    if offer.slot != "event" and own not in filled:
        yield Problem(f"{key}: stands in group {GROUP}{offer.slot} but has no {own}", key, "tell its author")
    for hook, options in filled.items():
        spec = getattr(hookspecs, hook, None)
        if spec is None:
            near = difflib.get_close_matches(
                hook, [name for name in dir(hookspecs) if name.startswith("ds_")], n=1
            )
            yield Problem(
                f"{key}: there is no hook {hook}",
                key,
                f"did you mean {near[0]}?" if near else "tell its author",
            )
            continue
        if hook in slot_hooks and hook != own:
            yield Problem(f"{key}: fills {hook}, which is the hook of another slot", key, "tell its author")
        if order := [name for name in ("tryfirst", "trylast") if options.get(name)]:
            said = f"{key}: {hook}: the recipe orders plugins, not tryfirst/trylast"
            yield Problem(said, key, f"drop {order[0]}")
        if options.get("wrapper") or options.get("hookwrapper"):
            yield Problem(f"{key}: {hook}: a wrapper would be a second owner", key, "tell its author")
        allowed = set(inspect.signature(spec).parameters)
        function = inspect.getattr_static(type(plugin), hook)
        if inspect.isfunction(function) and next(iter(inspect.signature(function).parameters), "") in allowed:
            yield Problem(f"{key}: {hook} has no self before its arguments", key, "tell its author")
        extra = set(inspect.signature(getattr(plugin, hook)).parameters) - allowed
        if extra:
            said = f"{key}: {hook} asks for {', '.join(sorted(extra))}; it may ask for {', '.join(allowed)}"
            yield Problem(said, key, "tell its author")


def _implementations(plugin: object) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for name in dir(type(plugin)):
        marked = getattr(getattr(type(plugin), name), "dsplugins_impl", None)
        if marked is not None:
            yield name, marked


def _ownership(chosen: Sequence[Chosen]) -> Iterable[Problem]:
    for slot in SLOTS:
        owners = [item.name for item in chosen if item.slot == slot]
        if len(owners) > 1:
            said = f"slot {slot} is filled twice: by {' and by '.join(owners)}"
            yield Problem(said, f"plugins.{owners[-1]}", f"drop one: `{owners[0]}: null` under plugins")


def _empty_slots(recipe: Recipe, chosen: Sequence[Chosen]) -> list[str]:
    """Those that the model needs and nobody fills."""
    needed, model = list(REQUIRED), recipe.sections.get("model", {})
    if model.get("num_moe_experts"):
        needed += REQUIRED_BY_MOE
    if model.get("mtp_num_layers"):
        needed.append("mtp")
    filled = {item.slot for item in chosen}
    return [slot for slot in needed if slot not in filled]


def _fill(slot: str, everyone: Sequence[Offer]) -> str:
    offered = ", ".join(offer.name for offer in everyone if offer.slot == slot)
    return f"name one under plugins: {offered}"


def _declarations(
    chosen: Sequence[Chosen], everyone: Sequence[Offer], told: Collection[str]
) -> Iterable[Problem]:
    """What plugins require and exclude. A slot or plugin that a problem is `told` of is one, not two."""
    names = {item.name for item in chosen} | {item.slot for item in chosen}
    for item in chosen:
        key = f"plugins.{item.name}"
        for other in getattr(item.plugin, "requires", ()):
            if other not in names and other not in told:
                remedy = _fill(other, everyone) if other in SLOTS else f"name {other} under plugins"
                yield Problem(f"{key}: requires {other}", key, remedy)
        for other in getattr(item.plugin, "conflicts", ()):
            if other in names:
                yield Problem(f"{key}: conflicts with {other}", key, f"drop one: `{other}: null`")
    yield from contradictions(chosen)


def _plain(options: Any) -> Any:
    from dsplugins.schedules import Schedule

    if options is None:
        return {}
    raw = {name: getattr(options, name) for name in asdict(options)}
    return {k: v.to_raw() if isinstance(v, Schedule) else v for k, v in raw.items()}
