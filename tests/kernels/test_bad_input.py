"""What is wrong is said by name before anything is launched, for either implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import free_kernels
from tests.kernels.helpers import table

META = torch.device("meta")


def good() -> dict[str, dict[str, Any]]:
    """Arguments of every operation: B = 2, W = 3, D = 4."""
    rows, window = torch.zeros(2, 4), torch.zeros(2, 3, 4)
    index, sums, process = torch.ones(2, dtype=torch.int64), torch.ones(2), table()
    return {
        "philox": {"seed": index, "step": index, "num_counters": 3},
        "normal": {"seed": index, "step": index, "numel": 3},
        "uniform": {"seed": index, "step": index},
        "posterior": {"state": rows, "output": rows, "seed": index, "step": index, "table": process},
        "householder": {"noise": rows, "delta": rows, "inner": sums, "squared_norm": sums},
        "acceptance": {
            "state": window,
            "target_output": window,
            "draft_output": window,
            "seed": index,
            "step": index,
            "table": process,
        },
        "acceptance_from_means": {"proposal": rows, "target_mean": rows, "draft_mean": rows, "std": sums},
        "propose": {
            "state": rows,
            "seed": index,
            "step": index,
            "window": 3,
            "anchor_states": window,
            "anchor_outputs": window,
            "anchor_step": index,
            "anchor_length": index,
            "table": process,
        },
        "verify": {
            "states": window,
            "target_output": window,
            "draft_output": window[:, 1:],
            "seed": index,
            "step": index,
            "length": index,
            "table": process,
        },
        "span": {"step": index, "reach": index, "window": 3},
        "finite": {"target_output": window, "length": index, "state": rows},
        "tally": {
            "progress": torch.zeros(4, 2, dtype=torch.int64),
            "by_step": torch.zeros(5, 3, dtype=torch.float64),
            "index": torch.arange(2),
            "step": index,
            "length": index,
            "advance": index,
            "rejected": index > 0,
            "squared_norm": rows,
            "next_step": index,
            "state_finite": index > 0,
        },
        "relaxed_tau": {
            "uncertainty": rows,
            "strength": 1.0,
            "squared_norm": rows,
            "spent": torch.zeros(2, 3, dtype=torch.float64),
            "budget": 0.5,
        },
        "relaxed_cost": {
            "squared_norm": rows,
            "log_ratio": rows,
            "tau": rows,
            "advance": index,
            "rejected": index > 0,
            "seed": index,
            "step": index,
            "spent": torch.zeros(2, 3, dtype=torch.float64),
            "rejection": torch.zeros(2, 2, dtype=torch.float64),
            "uniforms": rows,
        },
    }


def tensors() -> list[tuple[str, str]]:
    return [
        (operation, name)
        for operation, arguments in good().items()
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor)
    ]


def refuses(operation: str, message: str, **wrong: Any) -> None:
    for impl in ("reference", "triton", "auto"):
        with pytest.raises(ValueError, match=message):
            getattr(free_kernels, operation)(**good()[operation] | wrong, impl=impl)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_the_good_arguments_are_good() -> None:
    for operation, arguments in good().items():
        getattr(free_kernels, operation)(**arguments, impl="reference")


@pytest.mark.parametrize(("operation", "name"), tensors())
def test_dtype(operation: str, name: str) -> None:
    value = good()[operation][name]
    wrong = torch.float32 if value.dtype == torch.int64 else torch.int32
    refuses(operation, rf"^{name} has dtype {wrong}; allowed", **{name: value.to(wrong)})


@pytest.mark.parametrize(
    ("operation", "name"),
    [pair for pair in tensors() if pair[1] != next(iter(good()[pair[0]]))],
)
def test_device(operation: str, name: str) -> None:
    """The first tensor's device is the operation's; any other argument may be the stray one."""
    refuses(operation, rf"^{name} is on meta; the other arguments are on cpu", **{name: good()[operation][name].to(META)})


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        pair
        for pair in tensors()
        if pair[0] not in ("philox", "normal", "uniform", "span")
        and pair not in (("tally", "by_step"), ("tally", "index"))  # of other sizes than the batch; what the batch is
    ],
)
def test_batch(operation: str, name: str) -> None:
    """One row too few: the argument itself is named, or, for the first, one that no longer fits it."""
    value = good()[operation][name]
    first = next(iter(good()[operation]))
    who = r"\w+" if name == first else name
    refuses(operation, rf"^{who} has shape \([\d, ]+\); allowed is", **{name: value[:1]})


@pytest.mark.parametrize(
    ("operation", "name", "shape"),
    [
        ("posterior", "state", (2, 0)),
        ("posterior", "state", (0, 4)),
        ("posterior", "state", (4,)),
        ("posterior", "output", (2, 5)),
        ("householder", "noise", (2, 0)),
        ("householder", "inner", (2, 1)),
        ("acceptance", "state", (2, 0, 4)),
        ("acceptance", "state", (2, 3, 0)),
        ("acceptance", "draft_output", (2, 3, 5)),
        ("acceptance_from_means", "proposal", (0, 4)),
        ("acceptance_from_means", "std", (3,)),
        ("propose", "state", (2, 0)),
        ("propose", "anchor_states", (2, 0, 4)),
        ("propose", "anchor_outputs", (2, 2, 4)),
        ("verify", "states", (2, 0, 4)),
        ("verify", "states", (2, 3, 0)),
        ("verify", "states", (2, 12)),
        ("verify", "draft_output", (2, 3, 4)),
        ("verify", "length", (2, 1)),
        ("span", "step", (2, 1)),
        ("span", "reach", (0,)),
        ("finite", "target_output", (2, 0, 4)),
        ("finite", "state", (2, 5)),
        ("tally", "progress", (3, 2)),
        ("tally", "by_step", (5, 2)),
        ("relaxed_tau", "squared_norm", (2, 3)),
        ("relaxed_cost", "log_ratio", (2, 3)),
        ("relaxed_cost", "tau", (2, 3)),
        ("relaxed_cost", "spent", (2, 2)),
    ],
)
def test_shape(operation: str, name: str, shape: tuple[int, ...]) -> None:
    wrong = torch.zeros(shape, dtype=good()[operation][name].dtype)
    refuses(operation, rf"^{name} has shape", **{name: wrong})


@pytest.mark.parametrize("operation", ["posterior", "acceptance", "verify"])
def test_optional_arguments(operation: str) -> None:
    first = next(iter(good()[operation]))
    like = good()[operation][first]
    refuses(operation, "^guidance_scale is 1.5 without unconditional_output", guidance_scale=1.5)
    refuses(operation, "^unconditional_output has shape", unconditional_output=like[:, :1])
    refuses(operation, "^unconditional_output has dtype", unconditional_output=like.half())
    refuses(operation, "^noise has shape", noise=like[:1])
    refuses(operation, "^noise has dtype torch.int64", noise=like.long())
    refuses(operation, "^noise is on meta", noise=like.to(META))


def test_optional_arguments_of_propose() -> None:
    for name in ("noise", "correction"):
        refuses("propose", rf"^{name} has shape \(2, 3, 5\); allowed is \(2, any, 4\)", **{name: torch.zeros(2, 3, 5)})
        refuses("propose", rf"^{name} has shape \(2, 4\); allowed", **{name: torch.zeros(2, 4)})
        refuses("propose", rf"^{name} has dtype torch.int64", **{name: torch.zeros(2, 2, 4).long()})
        refuses("propose", rf"^{name} is on meta", **{name: torch.zeros(2, 2, 4, device=META)})


def test_optional_arguments_of_verify() -> None:
    for name in ("uniforms", "tau"):
        refuses("verify", rf"^{name} has shape \(1, 2\); allowed is \(2, any\)", **{name: torch.zeros(1, 2)})
        refuses("verify", rf"^{name} has shape \(2,\); allowed", **{name: torch.zeros(2)})
        refuses("verify", rf"^{name} has dtype torch.int64", **{name: torch.zeros(2, 2).long()})
        refuses("verify", rf"^{name} is on meta", **{name: torch.zeros(2, 2, device=META)})


def test_too_few_columns() -> None:
    refuses("propose", "^correction has 1 columns; a window of 3 needs 2", correction=torch.zeros(2, 1, 4))
    refuses("propose", "^noise has 1 columns; a window of 3 needs 2", noise=torch.zeros(2, 1, 4))
    refuses("verify", "^tau has 1 columns; a window of 3 needs 2", tau=torch.zeros(2, 1))
    refuses("verify", "^uniforms has 1 columns; a window of 3 needs 2", uniforms=torch.zeros(2, 1))
    refuses("relaxed_cost", "^uniforms has 3 columns; a window of 5 needs 4", uniforms=torch.zeros(2, 3))
    refuses("propose", "^window is 0; allowed is 1 or more", window=0)
    refuses("propose", "^draft is 'hold'; known are 'hold-x0', 'hold-output'", draft="hold")


def test_what_a_round_is_made_of() -> None:
    refuses("span", "^window is 0; allowed is 1 or more", window=0)
    refuses("finite", "^unconditional_output has shape", unconditional_output=torch.zeros(2, 2, 4))
    refuses("finite", "^unconditional_output is on meta", unconditional_output=torch.zeros(2, 3, 4, device=META))
    for name, shape in (("progress", (2, 4)), ("by_step", (3, 5))):
        across = torch.zeros(shape, dtype=good()["tally"][name].dtype).T
        refuses("tally", rf"^{name} has strides .*; allowed is contiguous memory", **{name: across})
    for name in ("squared_norm", "spent"):
        refuses("relaxed_tau", r"^budget is 0\.5 without squared_norm and spent", **{name: None})


@pytest.mark.parametrize("operation", ["posterior", "acceptance", "propose", "verify"])
def test_table(operation: str) -> None:
    process = table()
    refuses(operation, r"^table\.std has shape \(19,\)", table=process._replace(std=process.std[1:]))
    refuses(operation, r"^table\.model_coef is on meta", table=process._replace(model_coef=process.model_coef.to(META)))
    refuses(operation, r"^table\.std has dtype torch.int64", table=process._replace(std=process.std.long()))
    refuses(operation, r"^table\.clip_range is 0.0", table=process._replace(clip_range=0.0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"numel": 0}, "^numel is 0; allowed is 1"),
        ({"numel": 2**34 + 1}, r"^numel is 17179869185; allowed is 1 … 2\*\*34"),
        ({"stream": -1}, "^stream is -1; allowed"),
        ({"stream": 2**32}, "^stream is 4294967296; allowed"),
    ],
)
def test_counts(wrong: dict[str, int], message: str) -> None:
    refuses("normal", message, **wrong)


def huge(*shape: int) -> torch.Tensor:
    return torch.zeros(1).expand(*shape)


@pytest.mark.parametrize(
    ("operation", "wrong"),
    [
        ("posterior", {"state": (2, 2**34)}),
        ("householder", {"noise": (2**18, 2**17)}),
        ("acceptance", {"state": (2, 2**17, 2**17)}),
        ("acceptance_from_means", {"proposal": (2, 2**34)}),
        ("propose", {"anchor_states": (2, 2**33, 4)}),
        ("verify", {"states": (2, 3, 2**33)}),
    ],
)
def test_more_elements_than_are_allowed(operation: str, wrong: dict[str, tuple[int, ...]]) -> None:
    """By expanded tensors, which take no memory."""
    name, shape = next(iter(wrong.items()))
    refuses(operation, rf"^{name} has \d+ elements; at most 17179869184 are allowed", **{name: huge(*shape)})


def test_results_larger_than_is_allowed() -> None:
    """A window can be too large though none of its inputs is."""
    refuses("propose", "^window is 8589934592: more elements than the 17179869184 allowed", window=2**33)
    seeds = torch.ones(1, dtype=torch.int64).expand(2**20)
    for operation, name in (("normal", "numel"), ("philox", "num_counters")):
        message = rf"^{name} is 1048576 for 1048576 seeds: more numbers than the 17179869184 allowed"
        refuses(operation, message, seed=seeds, step=seeds, **{name: 2**20})


@pytest.mark.parametrize("operation", ["philox", "normal", "uniform"])
def test_seeds_and_steps_that_do_not_broadcast(operation: str) -> None:
    refuses(operation, r"^step has shape \(3,\); it must broadcast", step=torch.ones(3, dtype=torch.int64))
