"""MXFP8 by TransformerEngine: blocks of 32, scales of powers of two, for Blackwell's tensor cores."""

from __future__ import annotations

from collections.abc import Iterable

from dsplugins.plugins.precision.te_recipe import TeRecipe, shown

BLACKWELL, WITHOUT = (10, 0), (12, 0)


class TeMxfp8(TeRecipe):
    """`fp8_recipe: mxfp8` of megatron-core: TransformerEngine's `MXFP8BlockScaling`.

    1 x 32 blocks for all operands, scales in E8M0, E4M3: not V3's tiles, but what Blackwell multiplies as it
    comes. Needs the backend `te`, experts `sequential`, Blackwell (sm_100).
    """

    name = "te_mxfp8"
    recipe = "mxfp8"
    oldest = (2, 1)
    multiple = 32

    def unfit(self, capability: tuple[int, int], cuda: str | None) -> Iterable[str]:
        """Hopper and older have no such tensor cores; for sm_120 TransformerEngine doesn't have it yet."""
        if (9, 0) <= capability < BLACKWELL:
            yield f"needs Blackwell (sm_100): Hopper ({shown(capability)}) has no MXFP8, but te_blockwise"
        elif capability < BLACKWELL or capability >= WITHOUT:
            yield f"needs Blackwell (sm_100), this GPU is {shown(capability)}"
