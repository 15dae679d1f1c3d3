"""Compiles every kernel of `fp8_v3` for sm_90 down to a binary, without a GPU; prints what came out as JSON.

A process of its own: Triton's interpreter, which other tests use, leaves its language changed.
"""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dsplugins.plugins.precision.fp8 import kernels

TYPES = {
    "x": "*bf16", "x_scales": "*fp32", "inner": "*bf16", "probs": "*fp32", "weight": "*bf16",
    "codes": "*fp8e4nv",
    "scales": "*fp32", "tiles": "*i64", "packed": "*u8", "y": "*bf16",
}  # fmt: skip
FORMS = {
    "rows_kernel": [{"POWER_OF_TWO": False, "BLOCK": 32}],
    "swiglu_rows_kernel": [
        {"HAS_PROBS": probs, "POWER_OF_TWO": False, "BLOCK": 32} for probs in (False, True)
    ],
    "columns_kernel": [
        {"QUANTISED": quantised, "POWER_OF_TWO": True, "BLOCK": 64} for quantised in (False, True)
    ],
    "e5m6_pack_kernel": [{"BLOCK": 32}],
    "e5m6_unpack_kernel": [{"BLOCK": 32}],
    "blocks_kernel": [{"POWER_OF_TWO": False, "TRANSPOSED": transposed} for transposed in (False, True)],
}


INPUTS = ("x", "inner", "weight")
"""In BF16 above; in FP32 where `outside` is `fp32`, and of E5M6."""


def compiled(kernel, constants, wide=False):
    types = TYPES | ({"x": "*fp8e4nv"} if constants.get("QUANTISED") else {})
    if wide:
        types |= dict.fromkeys(INPUTS, "*fp32")
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names
    }
    made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    return {"ptx": made.asm["ptx"], "cubin_bytes": len(made.asm["cubin"])}


there = {name: value for name, value in vars(kernels).items() if isinstance(value, JITFunction)}
print(
    json.dumps(
        {
            name: [
                compiled(kernel, constants, wide)
                for constants in FORMS[name]
                for wide in ((False,) if constants.get("QUANTISED") else (False, True))
            ]
            for name, kernel in there.items()
            if name.endswith("_kernel")
        }
    )
)
