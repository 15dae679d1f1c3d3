"""A backend with FP8 linears and experts in the place of its own. Imported from hook bodies only."""

from __future__ import annotations

from functools import cache
from typing import Any

from megatron.core.models.backends import BackendSpecProvider

from dsplugins.plugins.precision.fp8.linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from dsplugins.plugins.precision.fp8.modules import Fp8GroupedProducts, Fp8MLP, Fp8SharedExpertMLP
from dsplugins.plugins.precision.fp8.rule import Choice

LINEARS = (Fp8ColumnParallelLinear, Fp8RowParallelLinear)


@cache
def _bound(choice: Choice) -> tuple[type, type]:
    """Column- and row-parallel linears of one recipe. Core makes linears from a class and nothing else."""
    given = {"choice": choice}
    return tuple(type(linear.__name__, (linear,), given) for linear in LINEARS)  # type: ignore[return-value]


class Fp8Provider(BackendSpecProvider):
    """Norms and core attention of `backend`, which the report keeps in high precision; products in FP8.

    Embedding, head and gate are never asked of a backend: they stay as they are.
    """

    def __init__(self, backend: BackendSpecProvider, choice: Choice) -> None:
        self._backend, self._choice = backend, choice
        self._column, self._row = _bound(choice)

    def column_parallel_linear(self) -> type:
        """With this recipe's scales; the same class at each call."""
        return self._column

    def row_parallel_linear(self) -> type:
        """With this recipe's scales; the same class at each call."""
        return self._row

    def fuse_layernorm_and_linear(self) -> bool:
        """The backend's fused module would multiply in its own format."""
        return False

    def column_parallel_layer_norm_linear(self) -> None:
        """None: see `fuse_layernorm_and_linear`."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        """The backend's."""
        return self._backend.layer_norm(rms_norm=rms_norm, for_qk=for_qk, has_residual=has_residual)

    def core_attention(self) -> type:
        """The backend's."""
        return self._backend.core_attention()

    def activation_func(self) -> Any:
        """The backend's."""
        return self._backend.activation_func()

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """Not in this house: experts come from the slot `experts`."""
        raise NotImplementedError("experts come from the slot experts, not from the backend")

    def dense_mlp(self) -> type[Fp8MLP]:
        """The MLP of a layer without experts."""
        return Fp8MLP

    def expert_mlp(self) -> type[Fp8MLP]:
        """A routed expert."""
        return Fp8MLP

    def shared_expert_mlp(self) -> type[Fp8SharedExpertMLP]:
        """The shared experts."""
        return Fp8SharedExpertMLP

    def grouped_products(self) -> Fp8GroupedProducts:
        """Products of packed experts."""
        return Fp8GroupedProducts(self._choice)
