"""What a forward over a window of states takes, T(W), and what a round takes beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.models import GUIDANCE, Size, forward_of, request_of, untrained
from benchmarks.record import OUT_OF_TIME, Record
from benchmarks.timing import captured, median_microseconds
from free.drafters import Drafter, FeatureDrafter, as_drafter
from free.sampling.capture import Graphs
from free.sampling.request import Request
from free.sampling.statistics import Stopwatch
from free.sampling.window import Setup, advance, evaluate, first_window, propose

IMPLEMENTATIONS = ("eager", "captured", "compiled", "compiled and captured")
"""In the order in which they are measured: what needs no compiler is there soon."""
BEST = IMPLEMENTATIONS[-1]
NO_GRAPHS = "captured needs CUDA"

_SLOWEST = 0.4  # seconds of a forward: beyond, the device has long been full, and T(W) is a straight line
_SECONDS = 0.2  # spent on one measurement, about
_ROUNDS = 2  # before one is timed: until there are anchors
_FEWEST, _MOST = 3, 20  # repeats of it


def best(device: torch.device) -> str:
    """The fastest implementation that the device allows."""
    return BEST if device.type == "cuda" else "compiled"


def is_captured(implementation: str) -> bool:
    return implementation.endswith("captured")


def is_compiled(implementation: str) -> bool:
    return implementation.startswith("compiled")


def seconds_of(run: Callable[[], Any], device: torch.device, expected: float = 0.0) -> float:
    """Median of calls that follow one on the other; fewer of them the longer one is ``expected`` to take."""
    repeats = int(min(_MOST, max(_FEWEST, _SECONDS / max(expected, 1e-6))))
    return 1e-6 * median_microseconds(run, device, repeats, flush=False)


@torch.no_grad()
def forward_seconds(request: Request, implementation: str, windows: Sequence[int]) -> Iterator[tuple[int, float | str]]:
    """T(W) of each window, or why it was left out; evaluated as it is asked for."""
    device = request.seed.device
    if is_captured(implementation) and device.type != "cuda":
        yield from ((window, NO_GRAPHS) for window in windows)
        return
    before, taken = 0, 0.0
    for window in windows:
        expected = taken * window / max(before, 1)
        if expected > _SLOWEST:
            yield window, f"expected to take {expected:.1f} s, in proportion to a window of {before}"
            continue
        with request.running(compile=is_compiled(implementation)):
            try:
                forward = forward_of(request, window)
                taken = seconds_of(captured(forward) if is_captured(implementation) else forward, device, expected)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                yield from ((wider, "out of memory") for wider in windows if wider >= window)
                return
        before = window
        yield window, taken


def measure_windows(
    record: Record, sizes: Sequence[Size], batches: Sequence[int], windows: Sequence[int], device: torch.device
) -> None:
    """T(W) of each size, batch size and implementation, with and without guidance."""
    targets = {}
    for batch in batches:
        for guidance_scale in (GUIDANCE, 1.0):
            for size in sizes:
                for implementation in IMPLEMENTATIONS:
                    key = {
                        "benchmark": "forward",
                        "model": size.name,
                        "batch": batch,
                        "guidance_scale": guidance_scale,
                        "implementation": implementation,
                    }
                    missing = [window for window in windows if not record.known(**key, window=window)]
                    if record.out_of_time:
                        for window in missing:
                            record.skip(OUT_OF_TIME, **key, window=window)
                        continue
                    if missing and size not in targets:
                        targets[size] = untrained(size, device)
                    for window, seconds in (
                        forward_seconds(
                            request_of(targets[size], batch, guidance_scale, 250), implementation, missing
                        ) if missing else ()
                    ):  # fmt: skip
                        _write(record, seconds, **key, window=window, dtype=_dtype(targets[size]))


def _write(record: Record, seconds: float | str, **key: Any) -> None:
    if isinstance(seconds, str):
        record.skip(seconds, **key)
    else:
        record.write(**key, seconds_median=seconds)


def _dtype(target: Any) -> str:
    return str(target.dtype).removeprefix("torch.")


@torch.no_grad()
def measure_share(record: Record, sizes: Sequence[Size], batches: Sequence[int], window: int, device: torch.device) -> None:
    """A whole round, its target's forward alone and its drafting alone, all as graphs where there are any."""
    compiles = (False, True)
    for size in sizes:
        target = untrained(size, device)
        for batch in batches:
            for compile in compiles:
                for name, drafter in _drafters(target):
                    key = {
                        "benchmark": "share of a round",
                        "model": size.name,
                        "batch": batch,
                        "guidance_scale": GUIDANCE,
                        "drafter": name,
                        "window": window,
                        "implementation": _implementation(compile, device),
                    }
                    if record.known(**key):
                        continue
                    if record.out_of_time:
                        record.skip(OUT_OF_TIME, **key)
                        continue
                    request = request_of(target, batch, GUIDANCE, 250)
                    with request.running(drafter, compile=compile):
                        whole, forward, draft = _of_a_round(Setup.of(request, drafter, window, "auto"))
                    record.write(
                        **key,
                        dtype=_dtype(target),
                        seconds_round=whole,
                        seconds_target=forward,
                        seconds_draft=draft,
                        share_draft=draft / whole,
                        share_outside=(whole - forward - draft) / whole,
                    )


def _implementation(compile: bool, device: torch.device) -> str:
    if device.type != "cuda":
        return "compiled" if compile else "eager"
    return BEST if compile else "captured"


def _drafters(target: Any) -> Iterator[tuple[str, Drafter]]:
    for name in ("hold-x0", "gains"):
        yield name, as_drafter(name, target.device)
    for sweeps, name in ((1, "feature, one sweep"), (0, "feature, step by step")):
        yield name, FeatureDrafter.from_target(target, sweeps=sweeps)


def _of_a_round(setup: Setup) -> tuple[float, float, float]:
    """Seconds of the round, of the target's forward in it, and of its drafting."""
    request, device, silent = setup.request, setup.request.seed.device, Stopwatch(torch.device("cpu"))
    live = first_window(setup, request.initial_state())
    for _ in range(_ROUNDS):
        live, _ = advance(live, setup, setup.widest, silent)
    proposed = propose(live, setup, setup.widest)

    def forward() -> Any:
        return evaluate(proposed.query, request.conditioning, request)

    def draft() -> Any:
        return setup.drafter.propose(proposed.situation)

    graphs = Graphs.of(setup) if device.type == "cuda" else None

    def whole() -> None:
        nonlocal live
        if graphs:
            live, _ = graphs.advance(live, setup.widest, silent)
        else:
            advance(live, setup, setup.widest, silent)

    alone = [captured(run) if graphs else run for run in (forward, draft)]
    seconds_round, seconds_target, seconds_draft = (seconds_of(run, device) for run in (whole, *alone))
    return seconds_round, seconds_target, seconds_draft
