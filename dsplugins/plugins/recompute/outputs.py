"""Drop outputs that can be made again, and make them again just before backward needs them.

Imported from hook bodies only: it needs torch and megatron-core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionLayer,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.multiprocessing.reductions import StorageWeakRef

from dsplugins.numerics import remade

NORMS = (
    "input_layernorm",
    "pre_mlp_layernorm",
    "q_layernorm",
    "k_layernorm",
    "kv_layernorm",
    "final_layernorm",
    "enorm",
    "hnorm",
)
"""Attribute names that megatron-core gives its norms."""


@dataclass
class Report:
    """What was kept out of memory in the latest forward pass of a chunk, measured."""

    norms: int = 0
    """Norms in this chunk whose outputs are dropped."""
    avoided: dict[str, int] = field(default_factory=dict)
    """Name of the module whose output (of `eh_proj`: input) was dropped -> bytes."""

    @property
    def avoided_bytes(self) -> int:
        """Bytes that backward would have kept, for one micro-batch."""
        return sum(self.avoided.values())


@dataclass(frozen=True)
class Output:
    """A tensor that `make` can make again, bit for bit; doesn't keep it alive."""

    name: str
    make: Callable[[], torch.Tensor]
    storage: StorageWeakRef
    nbytes: int

    def held(self) -> torch.UntypedStorage | None:
        """The tensor's memory, if anything (now: autograd) still holds it."""
        return torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)

    def drop(self) -> None:
        """Give the memory back; whoever holds the tensor keeps an empty shell."""
        storage = self.held()
        assert storage is not None
        storage.resize_(0)

    def restore(self) -> None:
        """Fill the shell again."""
        storage = self.held()
        if storage is None:
            return
        with torch.no_grad():
            made = self.make().untyped_storage()
        assert made.nbytes() == self.nbytes, f"{self.name}: made again with another size"
        storage.resize_(self.nbytes)
        storage.copy_(made)


class Outputs:
    """Watches one model chunk through module hooks.

    A *scope* is one call of a layer, of an MTP layer or of the chunk. When it ends, each norm output made
    in it that autograd still holds is emptied, as core's `CheckpointWithoutOutput` does
    (megatron/core/tensor_parallel/random.py), and a hook on the scope's own output fills it again when
    the gradient arrives there: before any of its readers runs backward, and once, however many readers
    there are. An output that nobody kept, or that leaves the scope, is left alone. Made from the same
    input by the same code, it has the same bits; the first call of each module checks that.

    Whoever keeps a norm's output from a module hook of its own and reads it after the layer has returned
    finds it empty.
    """

    def __init__(self) -> None:
        self.report = Report()
        self._scopes: list[list[Output]] = []
        self._checked: set[str] = set()

    def attach(self, chunk: torch.nn.Module) -> None:
        """Put the hooks on `chunk`'s modules; none of them holds a parameter or a buffer."""
        for name, norm in norms_of(chunk):
            norm.register_forward_hook(partial(self._after_norm, name))
            self.report.norms += 1
        for name, module in chunk.named_modules():
            if module is chunk or isinstance(module, (TransformerLayer, MultiTokenPredictionLayer)):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, always_call=True)
            if isinstance(module, MultiTokenPredictionLayer):
                module.eh_proj.register_forward_pre_hook(partial(self._before_eh_proj, name))
            if isinstance(module, MultiTokenPredictionBlock):
                module.register_forward_hook(partial(self._after_mtp_block, name), with_kwargs=True)

    # -- what can be made again -------------------------------------------------------------------

    def _after_norm(
        self, name: str, norm: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> None:
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"{name} returned {type(output).__name__}; v3_recompute knows tensors only")
        source = args[0].detach()  # its memory only, not the graph behind it
        self._note(name, partial(norm.forward, source), output)

    def _before_eh_proj(self, layer: str, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Its input is core's `torch.cat((enorm(embedding), hnorm(hidden)), -1)`: a copy of both outputs."""
        if not torch.is_grad_enabled():
            return
        parts = [self._latest(f"{layer}.{norm}") for norm in ("enorm", "hnorm")]
        self._note(f"{layer}.eh_proj", lambda: torch.cat([part.make() for part in parts], -1), args[0])

    def _after_mtp_block(self, block: str, module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        """Its output is core's `torch.cat([hidden, output of each MTP layer])`, which the head reads."""
        if not torch.is_grad_enabled() or module.mtp_use_repeated_layer:
            return
        hidden = kwargs["hidden_states"].detach()
        parts = [self._latest(f"{block}.layers.{i}.final_layernorm") for i in range(len(module.layers))]
        self._note(block, lambda: torch.cat([hidden, *(part.make() for part in parts)]), output)

    def _latest(self, name: str) -> Output:
        return next(output for output in reversed(self._scopes[-1]) if output.name == name)

    def _note(self, name: str, make: Callable[[], torch.Tensor], output: torch.Tensor) -> None:
        if not torch.is_grad_enabled() or not self._scopes:
            return
        if name not in self._checked:
            self._check(name, make, output)
        storage = output.untyped_storage()
        made = Output(name, make, StorageWeakRef(storage), storage.nbytes())
        self._scopes[-1].append(made)
        remade.note(made.storage)

    def _check(self, name: str, make: Callable[[], torch.Tensor], output: torch.Tensor) -> None:
        with torch.no_grad():
            again = make()
        whole = output.untyped_storage().nbytes() == output.numel() * output.element_size()
        if not whole or again.stride() != output.stride() or not torch.equal(again, output):
            raise RuntimeError(f"v3_recompute: {name} doesn't come out the same when it is made again")
        self._checked.add(name)

    # -- scopes -----------------------------------------------------------------------------------

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        if not self._scopes:
            self.report.avoided = {}
        self._scopes.append([])

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        outputs = self._scopes.pop()
        leaving = [t for t in _flat(output) if isinstance(t, torch.Tensor)]
        trigger = next((t for t in leaving if t.grad_fn is not None), None)
        passed_on = {t.untyped_storage()._cdata for t in leaving}
        dropped = []
        for made in outputs:
            if made.storage.cdata in passed_on or trigger is None:
                if self._scopes:
                    self._scopes[-1].append(made)
                    continue
            elif made.held() is not None:
                made.drop()
                dropped.append(made)
                self.report.avoided[made.name] = made.nbytes
            remade.forget(made.storage)
        if trigger is not None and dropped:
            trigger.register_hook(partial(_restore, dropped))


def norms_of(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Name and module of every norm in `chunk`; one that was fused into a linear doesn't count."""
    for name, module in chunk.named_modules():
        if name.rpartition(".")[2] in NORMS and not isinstance(module, (IdentityOp, torch.nn.Identity)):
            yield name, module


def _restore(outputs: list[Output], grad: torch.Tensor) -> None:
    for output in outputs:
        output.restore()
    outputs.clear()  # lets go of the inputs; a second backward finds everything in place


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
    else:
        yield value
