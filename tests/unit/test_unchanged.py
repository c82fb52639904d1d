"""What a seed draws stays what it was: samples of the revision before a round was split in two, in ``samples.json``.

A change of the arithmetic may move the last digits, and then says so; a change of the algorithm moves all of them. Numbers
are compared and not their hash, since another processor's logarithm differs in the last bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import free
from tests.analytic import ElementwiseTarget, GaussianTarget

KNOWN: dict[str, Any] = json.loads((Path(__file__).parent / "samples.json").read_text(encoding="utf-8"))
PLAN = free.WindowPlan(np.array([3, 1, 5, 2, 4, 1, 6, 3, 2, 1]))


@pytest.mark.parametrize("case", KNOWN)
def test_samples_are_what_they_were(case: str) -> None:
    target, drafter, window, form = case.split(", ")
    model = GaussianTarget.example(6) if target == "gaussian" else ElementwiseTarget()
    output = free.speculative_sample(
        model,
        drafter,
        shape=(6,),
        process=free.ReverseProcess.ddpm(10, clip_sample=form == "clipped"),
        num_samples=3,
        seed=5,
        window=PLAN if window == "plan" else int(window),
    )
    assert output.stats.rounds.tolist() == KNOWN[case]["rounds"]
    torch.testing.assert_close(output.samples, torch.tensor(KNOWN[case]["samples"]), rtol=1e-6, atol=1e-6)
