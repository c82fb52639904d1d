"""The device that the kernels are tested on, and memory that shows what a kernel forgot to write."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.sanitizer import watched


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """CUDA where there is a GPU; else the CPU, whose tensors Triton's interpreter serves."""
    if request.param == "cpu":
        if torch.cuda.is_available():
            pytest.skip("with a GPU the kernels are compiled, not interpreted")
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """``torch.empty`` gives NaN, or the largest integer: a value that no kernel wrote does not pass for a result."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def _watched() -> Iterator[None]:
    """Where kernels are interpreted, what they touch in memory is watched; on a GPU ``compute-sanitizer`` is the watch."""
    if torch.cuda.is_available():
        yield
        return
    pytest.importorskip("triton")
    with watched():
        yield
