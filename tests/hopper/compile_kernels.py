"""Compiles all kernels of `fp8_v3` and `fp8_alltoall` for sm_90 down to a binary, without a GPU; prints JSON.

In the forms in which `casts` starts them: each choice of a constant, sizes and pointers of multiples of 16,
as a backend's widths are, and any. A process of its own: Triton's interpreter, which other tests use, leaves
its language changed.
"""

import itertools
import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dsplugins.plugins.dispatcher import payload_casts, payload_kernels
from dsplugins.plugins.precision.fp8 import casts, e5m6_kernels, kernels, swiglu_kernels

TYPES = {
    "x": "*bf16", "x_scales": "*fp32", "inner": "*bf16", "inner_scales": "*fp32", "probs": "*fp32",
    "weight": "*bf16", "dy": "*bf16", "dinner": "*bf16", "dprobs": "*fp32", "codes": "*fp8e4nv",
    "scales": "*fp32", "tiles": "*i64", "packed": "*u8", "y": "*bf16",
}  # fmt: skip
FLAGS = ("POWER_OF_TWO", "HAS_PROBS", "QUANTISED", "TRANSPOSED", "WORDS", "ALIGNED")
CHOICES = dict.fromkeys(FLAGS, (False, True)) | {"NUMBERS": (tl.bfloat16, tl.float32)}
OUTSIDE = ("x", "inner", "weight", "dy", "dinner", "y")
"""In BF16 above; in FP32 where `outside` is `fp32`."""
FROM_CODES = ("swiglu_columns_kernel", "swiglu_gradient_kernel")
"""Their `inner` is codes."""
ANY_SIZE = ("smallest", "width")
"""Bits of a number, and no size; a size of no multiple."""


def block(name, constants):
    channels = casts.OF_CODES if constants.get("QUANTISED") else casts.CHANNELS
    channels = casts.SWIGLU if name in FROM_CODES else channels
    return channels if "columns" in name else casts.TOKENS.get(name, payload_casts.TOKENS)


def types(name, constants, wide):
    found = TYPES | (dict.fromkeys(OUTSIDE, "*fp32") if wide else {})
    if name in FROM_CODES:
        found["inner"] = "*fp8e4nv"
    if constants.get("QUANTISED"):
        found["x"] = "*fp8e4nv"
    if "columns" in name:
        found["codes"] = "*i32"
    if constants.get("WORDS"):
        found["packed"] = "*i32"
    return found


def compiled(kernel, constants, wide, aligned):
    name = kernel.__name__
    given = types(name, constants, wide)
    signature = {arg: "constexpr" if arg in constants else given.get(arg, "i32") for arg in kernel.arg_names}
    sixteens = {
        (index,): [["tt.divisibility", 16]]
        for index, arg in enumerate(kernel.arg_names)
        if aligned and arg not in constants and arg not in ANY_SIZE
    }
    source = ASTSource(kernel, signature, constants, sixteens)
    made = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": casts.WARPS.get(name, 4)}
    )
    words = constants.get("WORDS", True) and constants.get("ALIGNED", True)
    return {"ptx": made.asm["ptx"], "cubin_bytes": len(made.asm["cubin"]), "aligned": aligned and words}


def forms(kernel):
    """Every choice of constants, in BF16 with sizes of multiples of 16; the first and the last of them in the
    other ways, too: in FP32, and with any size."""
    names = [name for name in CHOICES if name in kernel.arg_names]
    choices = [
        dict(zip(names, chosen, strict=True))
        for chosen in itertools.product(*(CHOICES[name] for name in names))
    ]
    if "BLOCK" in kernel.arg_names:
        choices = [chosen | {"BLOCK": block(kernel.__name__, chosen)} for chosen in choices]
    for chosen in choices:
        yield chosen, False, True
    for chosen in choices[:: max(1, len(choices) - 1)]:
        half, wide = (types(kernel.__name__, chosen, wide) for wide in (False, True))
        if any(half.get(arg) != wide.get(arg) for arg in kernel.arg_names):
            yield chosen, True, True
        if not chosen.get("WORDS") and not chosen.get("ALIGNED"):
            yield chosen, False, False


there = {
    name: value
    for module in (kernels, swiglu_kernels, e5m6_kernels, payload_kernels)
    for name, value in vars(module).items()
    if isinstance(value, JITFunction) and name.endswith("_kernel")
}
print(
    json.dumps({name: [compiled(kernel, *form) for form in forms(kernel)] for name, kernel in there.items()})
)
