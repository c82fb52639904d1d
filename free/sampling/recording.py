"""One CUDA graph: what a function launches, recorded once and replayed. It knows nothing of rounds."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

_ONE_AT_A_TIME = threading.Lock()


class Recording(Generic[T]):
    """What a function launches on the device, as one graph; a call launches it again.

    Args:
        function: works in place on tensors that stay where they are, and must not read from the device. It is called twice
            outside the graph, to compile and load what that takes, and not kept.
        pool: of the graphs' memory.
    """

    def __init__(self, function: Callable[[], T], pool: Any) -> None:
        side = _side_stream(torch.cuda.current_device())
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()
        # calls that other threads make meanwhile must not invalidate this capture
        recorded = torch.cuda.graph(
            self._graph,
            pool=pool,
            stream=_capture_stream(torch.cuda.current_device()),
            capture_error_mode="thread_local",
        )
        # the outer context leaves this stream the current one, also where torch's own fails at its end
        with _ONE_AT_A_TIME, _nothing_collected(), torch.cuda.stream(before), recorded:
            self._result = function()

    def __call__(self) -> T:
        self._graph.replay()
        return self._result


@cache
def _side_stream(_device: int) -> torch.cuda.Stream:
    """One for all recordings on a device: a stream of each one's own would keep memory of its own."""
    return torch.cuda.Stream()


@cache
def _capture_stream(_device: int) -> torch.cuda.Stream:
    """One a device, as for warming up: torch's default capture stream belongs to the device that captured first."""
    return torch.cuda.Stream()


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Collect garbage first and keep the collector off meanwhile: destroying a CUDA graph while another is captured breaks
    the capture.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def casts_recorded() -> Iterator[None]:
    """Turn autocast's weight cache off during capture: its casts are freed when autocast ends, and the graph would go on
    reading them.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
