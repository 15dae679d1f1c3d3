"""Tables of experts' runs: made on the host once, and sent without waiting."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dsplugins.plugins.precision.fp8 import host_tables
from dsplugins.plugins.precision.fp8.host_tables import on_device, sent

CPU = torch.device("cpu")


def test_those_of_a_stage_s_layers_and_micro_batches_stay():
    """V3's first stage: the forward pass of sixteen micro-batches before the first one's backward."""
    made = []

    @on_device
    def tables(splits):
        made.append(splits)
        return torch.tensor(splits), None

    runs = [(layer, micro_batch) for micro_batch in range(16) for layer in range(4)]
    first = [tables(run, device=CPU) for run in runs]
    again = [tables(run, device=CPU) for run in runs]
    assert made == runs and all(one[0] is other[0] for one, other in zip(first, again, strict=True))
    assert again[5][0].tolist() == [1, 1] and again[5][1] is None


def test_a_device_gets_them_from_pinned_memory_and_a_cpu_as_they_are(monkeypatch):
    """The machine of this test may have no CUDA: what is asked of torch is noted."""
    asked = []
    pinned = SimpleNamespace(to=lambda device, **how: asked.append((str(device), how)) or "there")
    table = SimpleNamespace(pin_memory=lambda: pinned)
    assert sent(table, torch.device("cuda", 1)) == "there"
    assert asked == [("cuda:1", {"non_blocking": True})]
    own = torch.arange(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    assert sent(own, CPU) is own


def test_each_stream_has_its_own(monkeypatch):
    """A copy is in order with the stream that it was queued on only."""
    streams, made = iter([1, 2, 1]), []
    monkeypatch.setattr(host_tables, "_stream", lambda device: next(streams))
    tables = on_device(lambda splits: made.append(splits) or (torch.tensor(splits),))
    for _ in range(3):
        tables((4,), device=CPU)
    assert made == [(4,), (4,)]
