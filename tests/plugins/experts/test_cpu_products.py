"""Products in few shapes: the bits of torch's own grouped product, and few sizes for oneDNN to compile."""

from __future__ import annotations

import pytest


def both(splits, inner, hidden, strided=False):
    """Names of what differs between ours and torch's: output, gradients of tokens and of weights."""
    import torch
    from torch.nn.functional import grouped_mm

    from dsplugins.plugins.experts.cpu_products import FewShapes

    generator = torch.Generator().manual_seed(sum(splits))
    total = sum(splits)

    def drawn(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    tokens, weight, grad = drawn(total, hidden), drawn(len(splits), inner, hidden), drawn(total, inner)
    ends = torch.tensor(splits).cumsum(0).to(torch.int32)
    found = []
    for product in (
        lambda x, w: FewShapes.apply(x, w, splits),
        lambda x, w: grouped_mm(x, w.transpose(1, 2), offs=ends),
    ):
        x, w = tokens.clone().requires_grad_(), weight.clone().requires_grad_()
        out = product(x, w)
        out.backward(grad.t().contiguous().t() if strided and not found else grad)
        found.append({"output": out.detach(), "tokens": x.grad, "weight": w.grad})
    ours, theirs = found
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize(
    "splits",
    [
        [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65],
        [0, 40, 0, 0, 1, 0],
        [257, 300, 511, 513, 700],
        [0, 0, 5],
        [1000],
    ],
    ids=str,
)
@pytest.mark.parametrize(("inner", "hidden"), [(128, 128), (64, 24), (16, 512)])
def test_the_bits_of_torchs_own(workers, splits, inner, hidden):
    assert workers(1).run(both, splits, inner, hidden)[0] == []


def test_single_rows(workers):
    """Torch has a product of its own for those, and one in ten thousand numbers is another there."""
    assert workers(1).run(both, [1] * 2000, 64, 64)[0] == []


def test_a_gradient_that_lies_otherwise(workers):
    assert workers(1).run(both, [33, 7, 0, 90], 64, 32, strided=True)[0] == []


def shapes(kind, steps):
    """Rows of all tokens' products with experts in some steps of the tiny run in BF16, and how many counts
    of tokens an expert had.
    """
    import torch
    from runs import assembled
    from torch.utils._python_dispatch import TorchDispatchMode

    from dsplugins.step import Progress, take_step

    class Seen(TorchDispatchMode):
        rows: set[int] = set()

        def __torch_dispatch__(self, called, types, args=(), kwargs=None):
            assert "grouped_mm" not in called.name()
            if called in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
                left, right = (tuple(each.shape) for each in args[:2])
                if right in ((32, 32), (16, 32)):  # fc1's and fc2's matrices, as forward has them
                    self.rows.add(left[0])
            return called(*args, **(kwargs or {}))

    overrides = ["plugins.grouped=null", f"plugins.{kind}={{}}", "plugins.fp32=null", "plugins.bf16={}"]
    with assembled([*overrides, "model.moe_shared_expert_intermediate_size=24"]) as run, Seen() as seen:
        progress, counts = Progress(), set()
        for _ in range(steps):
            step = take_step(run, progress)
            progress = progress.after(step)
            counts |= set(step.expert_counts.flatten().tolist())
    return sorted(seen.rows), len(counts)


@pytest.mark.parametrize("kind", ["grouped", "sequential"])
def test_a_run_makes_few_shapes(workers, kind):
    rows, counts = workers(1).run(shapes, kind, 3)[0]
    assert counts > 10, "tokens per expert vary"
    assert max(rows) > 1 and set(rows) <= {0, 1, 32, 64, 96, 128}


def test_sizes_are_few_and_close():
    from dsplugins.plugins.experts.cpu_products import SMALLEST, rounded

    sizes = {rows: rounded(rows) for rows in range(1, 5000)}
    assert all(rows <= size < rows + max(SMALLEST, rows / 8 + 1) for rows, size in sizes.items())
    assert len(set(sizes.values())) < 50
