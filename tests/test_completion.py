"""What a completion is drawn from."""

from __future__ import annotations

import pytest
import torch


def test_tokens_are_drawn_by_their_tempered_probabilities_and_the_seed_alone(single):
    from dsplugins.completion import TEMPERATURE, drawn

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]).log()
    draws = [int(drawn(logits, seed)) for seed in range(4000)]
    assert draws[:50] == [int(drawn(logits, seed)) for seed in range(50)]
    shares = torch.bincount(torch.tensor(draws), minlength=5) / len(draws)
    expected = torch.softmax(logits / TEMPERATURE, 0)
    assert shares.tolist() == pytest.approx(expected.tolist(), abs=0.03)  # four standard deviations
    assert shares[4] == 0
