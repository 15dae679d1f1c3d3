"""FP8 in blocks by TransformerEngine: the recipe of Megatron that is closest to V3's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dsplugins.plugins.precision.te_recipe import TeRecipe, Version, shown

HOPPER, BLACKWELL = (9, 0), (10, 0)
CUDA = (12, 9)
"""The first whose cuBLAS multiplies in these blocks."""


@dataclass(frozen=True)
class TeBlockwiseOptions:
    """Options of te_blockwise."""

    scales: Literal["power_of_two", "fp32"] = "power_of_two"
    """Of all tiles. A power of two is TransformerEngine's default; V3's report has `fp32` in most places,
    here the environment variable NVTE_FP8_BLOCK_SCALING_FP32_SCALES."""


class TeBlockwise(TeRecipe):
    """`fp8_recipe: blockwise` of megatron-core: TransformerEngine's `Float8BlockScaling`.

    1 x 128 tiles for activations and gradients, 128 x 128 for weights, E4M3, as the report (section 3.3);
    unlike it, all scales are of one kind, operands along the tokens are quantised from BF16 and not from
    codes, and nothing is kept in E5M6. `fp8_v3` is the report's. Needs the backend `te`, the experts
    `sequential`, Hopper or newer; on Blackwell TransformerEngine makes MXFP8 of it.
    """

    Options = TeBlockwiseOptions
    name = "te_blockwise"
    recipe = "blockwise"
    oldest = (2, 3)
    multiple = 16

    def __init__(self, options: TeBlockwiseOptions) -> None:
        self._fp32 = fp32 = options.scales == "fp32"
        self.env = {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1" if fp32 else "0"}
        """Read by TransformerEngine when it is imported."""

    def oldest_on(self, capability: tuple[int, int] | None) -> Version:
        """Later for Blackwell (TransformerEngine's pull request 2157)."""
        return (2, 9) if capability and capability >= BLACKWELL else self.oldest

    def unfit(self, capability: tuple[int, int], cuda: str | None) -> Iterable[str]:
        """Older than Hopper, a cuBLAS without block scaling, scales that MXFP8 doesn't have."""
        if capability < HOPPER:
            yield f"needs Hopper (sm_90) or newer, this GPU is {shown(capability)}"
        if cuda is not None and tuple(map(int, cuda.split(".")[:2])) < CUDA:
            yield f"needs a torch for CUDA 12.9 or newer, this one is for {cuda}"
        if capability >= BLACKWELL and self._fp32:
            yield f"has powers of two only on Blackwell ({shown(capability)}), but scales is fp32"
