"""What happens between backward and optimizer: one chain that the loop owns and prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class GradientChain:
    """Links in order: the pipeline schedule's gradient finalisation, then the routers' balance.

    Stands in megatron-core's `config.finalize_model_grads_func`, which each schedule calls at the end
    of its last backward.
    """

    def __init__(self, finalize_grads: Callable[..., None], balance: Callable[[], None]) -> None:
        self.links: tuple[tuple[str, Callable[..., None]], ...] = (
            (getattr(finalize_grads, "__name__", type(finalize_grads).__name__), finalize_grads),
            ("router counts and bias update", lambda *_, **__: balance()),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        for _, link in self.links:
            link(*args, **kwargs)

    def __str__(self) -> str:
        return " -> ".join(name for name, _ in self.links)
