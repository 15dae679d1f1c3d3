"""Recipe values -> dataclasses, and Megatron's fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from dsplugins.contracts import Range
from dsplugins.schedules import Schedule
from dsplugins.typed import build, check_megatron, field_docs


@dataclass(frozen=True)
class Inner:
    """A dataclass inside."""

    size: int
    """Of it."""


@dataclass(frozen=True)
class Options:
    """One field of every kind."""

    count: int
    """How many.

    A second paragraph."""
    rate: Annotated[float, Range(0.0, 1.0)] = 0.5
    update_rate: float = 0.1
    """Speed."""
    on: bool = False
    name: str = ""
    kind: Literal["a", "b", 1] = "a"
    maybe: Annotated[int | None, Range(1)] = None
    pair: tuple[int, str] = (1, "x")
    many: tuple[float, ...] = ()
    words: list[str] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)
    ramp: Annotated[Schedule, Range(0.0, None)] = field(default_factory=lambda: Schedule.constant(1))
    either: int | str = 0
    anything: Any = None
    inner: Inner | None = None
    shares: Annotated[tuple[float, ...], Range(None, 1.0)] = ()


def made(**values: Any) -> Options:
    found, problems = build(Options, {"count": 1, **values}, "plugins.x", "x")
    assert problems == []
    return found


def faults(**values: Any) -> list[str]:
    found, problems = build(Options, {"count": 1, **values}, "plugins.x", "x")
    assert (found is None) == bool(problems)
    return [problem.message for problem in problems]


GOOD: list[tuple[str, Any, Any]] = [
    ("count", 3, 3),
    ("count", 1e6, 1_000_000),
    ("rate", 1, 1.0),
    ("on", True, True),
    ("kind", "b", "b"),
    ("kind", 1, 1),
    ("maybe", None, None),
    ("maybe", 4, 4),
    ("pair", [2, "y"], (2, "y")),
    ("many", [1, 2.5], (1.0, 2.5)),
    ("many", [], ()),
    ("words", ["a"], ["a"]),
    ("table", {"a": 1}, {"a": 1}),
    ("ramp", 2, Schedule.constant(2)),
    ("either", "s", "s"),
    ("anything", {"x": [1]}, {"x": [1]}),
    ("inner", {"size": 2}, Inner(2)),
    ("shares", [0.5], (0.5,)),
]


@pytest.mark.parametrize(("name", "raw", "value"), GOOD)
def test_what_fits(name, raw, value):
    found = getattr(made(**{name: raw}), name)
    assert found == value and type(found) is type(value)


BAD: list[tuple[str, Any, str]] = [
    ("count", True, "count=true is not a whole number"),
    ("count", 1.5, "count=1.5 is not a whole number"),
    ("count", "3", "count='3' is not a whole number"),
    ("count", None, "count=null is not a whole number"),
    ("count", [1], "count=[1] is not a whole number"),
    ("rate", 2, "rate=2 is out of range (0 to 1)"),
    ("rate", False, "rate=false is not a number"),
    ("rate", float("nan"), "rate=nan is not a number"),
    ("rate", 10**400, "is not a number"),
    ("on", 1, "on=1 is not true or false"),
    ("name", 3, "name=3 is not text"),
    ("kind", "c", "kind='c' is not one of a, b, 1"),
    ("kind", True, "kind=true is not one of a, b, 1"),
    ("kind", ["a"], "is not one of"),
    ("maybe", 0, "maybe=0 is out of range (1 or more)"),
    ("maybe", "x", "maybe='x' is not a whole number"),
    ("pair", [1], "has 1 items, not 2"),
    ("pair", ["x", "y"], "its item 0 is not a whole number"),
    ("many", 1, "many=1 is not a list"),
    ("many", "ab", "is not a list"),
    ("words", [1], "its item 0 is not text"),
    ("table", {"a": "b"}, "its item a is not a whole number"),
    ("table", [1], "is not a mapping"),
    ("ramp", "fast", "ramp: 'fast' is not a number nor a list of phases"),
    ("ramp", [{"until": "1B", "from": -1, "to": 2}], "is out of range (0 or more)"),
    ("either", 1.5, "is not a whole number, and is not text"),
    ("inner", {"sise": 2}, "size is missing"),
    ("shares", [0.5, 2], "is out of range (1 or less)"),
]


@pytest.mark.parametrize(("name", "raw", "words"), BAD)
def test_what_does_not_fit(name, raw, words):
    found = faults(**{name: raw})
    assert len(found) == 1 and words in found[0] and found[0].startswith(f"plugins.x.{name}")


def test_every_problem_is_told_with_key_and_remedy():
    found, problems = build(Options, {"update_rat": 1, "rate": 3, "zzz": 0}, "plugins.x", "x")
    assert found is None
    assert {p.key: p.remedy for p in problems if p.key.endswith("update_rat")} == {
        "plugins.x.update_rat": "did you mean update_rate?"
    }
    assert problems[0].message == "plugins.x.update_rat is not an option of x"
    missing = next(p for p in problems if p.key == "plugins.x.count")
    assert "is missing" in missing.message and missing.remedy == "set it: how many."
    assert len(problems) == 4


def test_a_count_of_tokens_is_told_how_to_be_a_number():
    problems = build(Options, {"count": "14.8T"}, "train", "train")[1]
    assert problems[0].remedy == "write it as a number: 14800000000000"


def test_not_a_mapping_and_no_options():
    assert "is not a mapping" in build(Options, [1], "x", "x")[1][0].message

    @dataclass
    class Empty:
        """Nothing."""

    assert build(Empty, {"a": 1}, "x", "x")[1][0].remedy == "it has no options: drop it"


def test_what_a_dataclass_itself_refuses():
    @dataclass
    class Even:
        """Refuses odd numbers."""

        number: int = 0

        def __post_init__(self) -> None:
            if self.number % 2:
                raise ValueError("number is odd")

    found, problems = build(Even, {"number": 3}, "plugins.even", "even")
    assert found is None and "number is odd" in problems[0].message


def test_annotations_that_can_t_be_read_are_a_problem():
    @dataclass
    class Broken:
        """Names a type that is nowhere."""

        number: Nowhere  # type: ignore[name-defined] # noqa: F821

    assert "can't be read" in build(Broken, {"number": 1}, "plugins.b", "b")[1][0].message


@dataclass(frozen=True)
class Longer(Options):
    """Inherits."""

    added: int = 0
    """New here."""


def test_docs_come_from_the_source_and_from_parents():
    docs = field_docs(Longer)
    assert docs["added"] == "New here." and docs["update_rate"] == "Speed."
    assert docs["count"].startswith("How many.\n") and "rate" not in docs


def test_docs_without_source():
    assert field_docs(type("Made", (), {"__module__": "nowhere"})) == {}


@pytest.fixture(scope="module")
def megatron():
    """megatron-core's three configuration classes."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    return {"model": MLATransformerConfig, "optimizer": OptimizerConfig, "ddp": DistributedDataParallelConfig}


def test_megatron_s_own_defaults_fit(megatron):
    from dataclasses import MISSING, fields

    for section, cls in megatron.items():
        values = {f.name: f.default for f in fields(cls) if f.init and f.default is not MISSING}
        assert len(values) > 10 and check_megatron(cls, values, section) == []


MEGATRON: list[tuple[str, Any, str | None]] = [
    ("num_layers", 4, None),
    ("num_layers", "4", "model.num_layers='4' is not a whole number"),
    ("num_layers", True, "is not a whole number"),
    ("num_layers", None, "is not a whole number"),
    ("q_lora_rank", None, None),
    ("hidden_dropout", 0, None),
    ("hidden_dropout", "a lot", "is not a number"),
    ("moe_router_topk_scaling_factor", None, None),
    ("normalization", "RMSNorm", None),
    ("moe_router_dtype", "fp32", None),
    ("moe_router_dtype", "fp8", "is not one of fp32, fp64 or null"),
    ("activation_func", "silu", None),
    ("moe_aux_loss_coeff", [0.1, 0.2], None),
    ("moe_aux_loss_coeff", "x", "is not a number or a list"),
    ("moe_layer_freq", [1, 0], None),
    ("params_dtype", "bf16", "a dtype, which a recipe can't write"),
    ("attention_backend", "flash", "a AttnBackend, which a recipe can't write"),
    ("pipeline_model_parallel_layout", "Et|tL", None),
    ("add_bias_linear", 1, "is not true or false"),
    ("num_layer", 4, "is not an option of megatron-core's MLATransformerConfig"),
]


@pytest.mark.parametrize(("name", "value", "words"), MEGATRON)
def test_megatron_fields(megatron, name, value, words):
    problems = check_megatron(megatron["model"], {name: value}, "model")
    assert [p.key for p in problems] == ([] if words is None else [f"model.{name}"])
    if words is not None:
        assert words in problems[0].message
    if name == "num_layer":
        assert problems[0].remedy == "did you mean num_layers?"
