"""What hooks take and return.

This module and `hookspecs` are all that a plugin needs to know of dsplugins. Nothing here imports
torch or megatron-core at run time, so `--help`, `plugins list` and `explain` stay fast.

Shape legend, used everywhere: S sequence, B micro-batch, T tokens, H hidden, E routed experts,
K experts a token, L layers that have a router (decoder first, MTP last).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dsplugins.schedules import Schedule
from dsplugins.sections import DataOptions, Evaluate, RunOptions, Save, Train

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

CONTRACT = (1, 4)
"""Version of this contract: (major, minor). A plugin class may say `contract = ">=1.0,<2"`."""

SLOTS = (
    "platform",
    "model",
    "backend",
    "precision",
    "attention",
    "router",
    "experts",
    "dispatcher",
    "mtp",
    "recompute",
    "schedule",
    "optimizer",
    "data",
)
"""One owner each; the entry-point group of a slot is `dsplugins.<slot>`, of an event `dsplugins.event`."""


@dataclass(frozen=True)
class Range:
    """Closed bounds of a numeric option: `rate: Annotated[float, Range(0.0, 1.0)]`."""

    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe or with this machine, and what to do about it."""

    message: str
    """What is wrong, naming the key: `parallel.expert=16 does not divide model.num_moe_experts=24`."""
    key: str = ""
    """Dotted recipe key that the message is about; the host turns it into `file:line`."""
    remedy: str = ""
    """What to do, one line."""
    place: str = ""
    """`file:line`, `command line` or `plugin NAME`; filled in from `key` by the host when empty."""
    kind: Literal["recipe", "environment"] = "recipe"
    """`recipe` ends with exit code 3, `environment` with 4."""


class RecipeError(ValueError):
    """The recipe can't be run; carries every problem found, not only the first one."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(p.message for p in problems))


class EnvironmentUnfit(RuntimeError):
    """The recipe is right, but this machine lacks what it needs (exit code 4)."""


@dataclass(frozen=True)
class Layout:
    """How the ranks share the model. Sizes are Megatron's, with the recipe's short names."""

    world_size: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1

    @property
    def model_parallel(self) -> int:
        """Ranks that together hold one copy of the dense part of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Copies of the dense part: the data-parallel size."""
        return self.world_size // self.model_parallel

    @property
    def expert_data(self) -> int:
        """Copies of each expert."""
        return self.world_size // (self.expert * self.expert_tensor * self.pipeline)


@dataclass(frozen=True)
class Plan:
    """A recipe with its plugins chosen: frozen, the same on every rank."""

    name: str
    """The recipe's name, its file name without ending."""
    model: Mapping[str, Any]
    """`model:` as the recipe gives it: megatron-core's TransformerConfig fields and `vocab_size`."""
    optimizer: Mapping[str, Any]
    """`optimizer:` as given: megatron-core's OptimizerConfig fields."""
    ddp: Mapping[str, Any]
    """`ddp:` as given: megatron-core's DistributedDataParallelConfig fields."""
    layout: Layout
    data: DataOptions
    train: Train
    evaluate: Evaluate
    save: Save
    run: RunOptions
    plugins: tuple[str, ...]
    """Names of the chosen plugins, in call order."""
    slots: Mapping[str, str]
    """Slot -> name of the plugin that owns it."""


@dataclass(frozen=True)
class Settings:
    """megatron-core's own configuration objects, complete, each field with its one writer."""

    model: MLATransformerConfig
    optimizer: OptimizerConfig
    ddp: DistributedDataParallelConfig
    vocab_size: int
    """Rows of embedding and head."""
    scheduled: Mapping[str, Schedule] = field(default_factory=dict)
    """`model` field -> schedule: the loop sets these on every config object before each step."""
    writers: Mapping[str, str] = field(default_factory=dict)
    """Dotted field -> who wrote it (`base.yaml:12`, `plugin mla`, `derived`, `default`)."""


class Platform(Protocol):
    """Owner of the platform slot: where tensors live and which library moves them."""

    device_type: str
    """`cpu` or `cuda`."""
    distributed_backend: str
    """What `torch.distributed.init_process_group` is given: `gloo` or `nccl`."""

    def prepare(self, local_rank: int) -> torch.device:
        """Make this process ready, before megatron-core is imported; return its device.

        Raises `EnvironmentUnfit` when the device isn't there.
        """

    def problems(self, local_world_size: int) -> Iterable[Problem]:
        """What this machine lacks, without starting anything."""

    def synchronize(self) -> None:
        """Wait for the device; a no-op where there is nothing to wait for."""

    def peak_memory(self) -> int:
        """Bytes at the high-water mark of this process (device memory on `cuda`)."""


class PipelineSchedule(Protocol):
    """Owner of the schedule slot: how many chunks a rank holds, where layers stand, in which order they run.

    Layers are placed by megatron-core's `model.pipeline_model_parallel_layout`, which a schedule may write
    through `ds_settings`: stages in their order, chunk by chunk, or for any other order an instance of its
    own subclass of `PipelineParallelLayerLayout`. Embedding, head and MTP are built where it has them, also
    on one rank (DualPipeV's): then `forward_backward` carries what stages hand on, and `finalize_grads` sums
    the gradients of embedding copies that share a rank, as `tests/plugins/schedule/v_shape.py` does.
    """

    chunks: int
    """Model chunks that a rank holds (virtual pipeline size)."""

    def forward_backward(self) -> Callable[..., list[Any]]:
        """A function with the signature of Megatron's `get_forward_backward_func()` results.

        Called as `function(forward_step_func=, data_iterator=, model=, num_microbatches=, seq_length=,
        micro_batch_size=, forward_only=)`. `model` is the list of this rank's chunks, `data_iterator` one
        iterator, or a list where there are several chunks. `forward_step_func(iterator, chunk)` gives
        (output, `loss_func`), and `loss_func(output)` gives (loss [], to be divided by the number of
        micro-batches; {"loss": [] to report}); megatron-core's `forward_step` does both, and appends to a
        list what to report. That list is returned: an entry a micro-batch on the rank of the last stage,
        else none. With `forward_only` there is no backward. Else the function itself calls
        `config.finalize_model_grads_func(model)`, `config` being the chunks' own, once, at the end of the
        last backward: gradients are reduced and biases move there, and a step without it is refused.
        """

    def finalize_grads(self) -> Callable[..., None]:
        """Its part of gradient finalisation, with the signature of core's `finalize_model_grads`."""

    def refuses(self, microbatches: int) -> str | None:
        """Why a step with so many micro-batches can't run, or None."""


class Data(Protocol):
    """Owner of the data slot: samples by index, so that order never depends on when a run stopped."""

    vocab_size: int
    """Token ids are below this."""
    facts: Mapping[str, Any]
    """What to show at the start: files, bytes, tokens of each split. Of `validation_bytes` and
    `validation_tokens`, where they are there, bits per byte are made. Each checkpoint keeps `digest` and
    `tokenizer`, and a run goes on with others only where that is accepted."""

    def train(self, index: int) -> torch.Tensor:
        """Training sample `index`, any from 0 on: int64 [S + 1]. Pure: same index, same tokens."""

    def validation(self, index: int) -> torch.Tensor:
        """Validation sample `index` < `validation_size`: int64 [S + 1]."""

    @property
    def validation_size(self) -> int:
        """Number of validation samples."""

    def baselines(self) -> Mapping[str, float]:
        """Name -> cross entropy in nats a token on the validation split, of models anyone should beat."""

    def prompt(self) -> tuple[list[int], str] | None:
        """A held-out prompt as token ids and its true continuation as text; None if there is none."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids as text."""


RouterFactory = Callable[..., "torch.nn.Module"]
"""`factory(config=, pg_collection=, is_mtp_layer=, **kwargs) -> Router`, as `MoESubmodules.router` is called.

The module it makes is a `megatron.core.transformer.moe.router.Router` (usually a subclass) that
returns `(probs [T, E], routing_map bool [T, E])` from `forward(hidden, padding_mask=None)`, hidden
[S, B, H]. `routing` is an abstract method of megatron-core's class: it has to be there, with whatever
arguments your `forward` gives it. By contract the module owns

- `local_tokens_per_expert`: float32 buffer [E], not persistent: tokens that this rank sent to each
  expert since it was last zeroed; counted only while gradients are enabled, never twice when
  activations are recomputed. The loop sums it over TP x CP x DP and zeroes it after each step.
- optionally `aux_loss_sum`: float32 buffer [], not persistent: sum over micro-batches of this rank's
  share of the balance loss, already multiplied by its coefficient. The loop sums and zeroes it too.
- optionally `update_bias(tokens_per_expert)`: called once a step between backward and optimizer
  with the summed counts, float32 [E]. `config.moe_router_bias_update_rate` is this step's rate.
"""

ExpertsFactory = Callable[..., "torch.nn.Module"]
"""`factory(num_local_experts, config, pg_collection=, name=)`, as `MoESubmodules.experts` is called.

A class or a `partial` of one, never a module. The module that it makes is called as `forward(tokens,
tokens_per_expert, probs)`: tokens [T, H] of this rank's E experts, sorted by expert, T may be 0; counts
int64 [E], on the CPU or the device as the dispatcher leaves them; probs [T], the router's weights. It
returns `(output [T, H], None)`, each row times its weight. An expert without tokens takes part all the
same: its weights need a gradient. A parameter that other ranks don't hold has `allreduce = False`, as
megatron-core's `is_expert` linears set it, and its place among all experts in `sharded_state_dict`.
"""


class GroupedProducts(Protocol):
    """What a backend may offer beside core's `BackendSpecProvider`, as `grouped_products()`: the two products
    of a layer's experts whose weights are packed. This rank's E experts have `splits` [E] tokens, T together.
    """

    def up(self, tokens: torch.Tensor, weight: torch.Tensor, splits: torch.Tensor) -> torch.Tensor:
        """tokens [T, H], sorted by expert, times weight [E, 2I, H] transposed: [T, 2I], gate first."""

    def down(
        self, inner: torch.Tensor, probs: torch.Tensor, weight: torch.Tensor, splits: torch.Tensor
    ) -> torch.Tensor:
        """SwiGLU of inner [T, 2I] times probs [T], times weight [E, H, I] transposed: [T, H]."""


DispatcherFactory = Callable[..., Any]
"""`factory(num_local_experts, local_expert_indices, config=, pg_collection=) -> MoETokenDispatcher`.

Its methods are called in this order, once a forward: `dispatch_preprocess(hidden, routing_map, probs)` and
`token_dispatch(hidden, probs)`, each giving (tokens, probs); `dispatch_postprocess(tokens, probs)`, giving
(tokens [T, H] sorted by expert, counts [E], probs [T]) for the experts; then, on what they give,
`combine_preprocess(output)`, `token_combine(output)` and `combine_postprocess(output)`, which gives hidden
as it came. Communication belongs into `token_dispatch` and `token_combine`: what overlaps, overlaps there.
"""


class PluginState(Protocol):
    """What a plugin saves with each checkpoint and gets back when the run goes on."""

    version: int
    """Of what `save` returns; another number in a checkpoint stops the run before it starts."""

    def save(self) -> Mapping[str, Any]:
        """State that JSON can hold, after a step. Asked on every rank, rank 0's is kept; and once before the
        first step, to see that it can be saved."""

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take back what `save` gave; on every rank, before the first step."""


@dataclass(frozen=True)
class Step:
    """One finished step, as events see it. Numbers are the same on every rank."""

    step: int
    """1 for the first one."""
    tokens: int
    """Trained on so far, over the whole cluster."""
    loss: float
    """Mean next-token cross entropy, nats."""
    mtp_loss: float | None
    """Mean cross entropy of the MTP head, unweighted, nats."""
    aux_loss: float | None
    """Balance loss summed over layers, with its coefficient, mean over micro-batches."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    global_batch: int
    scheduled: Mapping[str, float]
    """Value of each scheduled Megatron field in this step."""
    expert_counts: torch.Tensor | None
    """int64 [L, E] on the CPU: tokens each expert got in this step, over the whole cluster."""
    router_layers: tuple[str, ...]
    """Names of the L routers: `decoder.3`, ..., `mtp.0`."""
    max_vio: float | None
    """(max load - mean load) / mean load, mean over layers (arXiv 2408.15664)."""
    seconds: float
    skipped: bool
    """True when the optimizer refused the gradients."""


@dataclass(frozen=True)
class Evaluation:
    """One look at the validation split."""

    step: int
    loss: float
    mtp_loss: float | None
    mtp_acceptance: float | None
    """Share of positions where MTP's token is the main model's own next one (greedy)."""
    sequences: int
    bits_per_byte: float | None = None
    """`loss` in bits over the bytes of text; None where the data don't tell how many a token has."""
    max_vio: float | None = None
    """(max load - mean load) / mean load over the whole evaluation, mean over layers."""
    expert_load: Mapping[str, tuple[int, ...]] | None = None
    """Layer (`decoder.3`, ..., `mtp.0`) -> tokens that each of its E experts got; None without experts."""


@dataclass(frozen=True)
class RunEnd:
    """What is known when a run is over."""

    plan: Plan
    directory: Path
    steps: int
    evaluation: Evaluation | None
    baselines: Mapping[str, float]
    completion: tuple[str, str, str] | None
    """Prompt, what the model wrote, what stood there."""


__all__ = [
    "CONTRACT",
    "SLOTS",
    "Data",
    "DataOptions",
    "DispatcherFactory",
    "EnvironmentUnfit",
    "Evaluate",
    "Evaluation",
    "ExpertsFactory",
    "GroupedProducts",
    "Layout",
    "PipelineSchedule",
    "Plan",
    "Platform",
    "PluginState",
    "Problem",
    "Range",
    "RecipeError",
    "RouterFactory",
    "RunEnd",
    "RunOptions",
    "Save",
    "Schedule",
    "Settings",
    "Step",
    "Train",
]
