"""Which window each round takes: fixed, or planned by step. A schedule may know what the host knows of settled steps."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from free.checks import is_int
from free.processes import ReverseProcess

WINDOWS = (1, 2, 4, 8, 16, 32, 64)
"""Windows that are weighed against each other."""

_FORMAT = "free-dit window plan, 2"


@dataclass
class Known:
    """What the host knows of an account."""

    step: np.ndarray
    """int64 [B]: steps settled."""
    rounds: np.ndarray
    """int64 [B]."""
    broke: np.ndarray
    """int64 [2, B]: the first step at which the model's, and the drafter's, output was not finite; S if none."""
    tested: np.ndarray
    """float64 [S]."""
    accepted: np.ndarray
    """float64 [S]."""

    @classmethod
    def nothing(cls, batch: int, num_steps: int) -> Known:
        """Before the first round."""
        zeros = np.zeros((2, batch), np.int64)
        return cls(zeros[0], zeros[1], zeros + num_steps, np.zeros(num_steps), np.zeros(num_steps))


class Schedule(ABC):
    """Chooses the window of each round, common to the samples of a batch."""

    widest: int
    """No window is wider."""
    name: int | str
    """As the statistics call it."""
    keys: Set[int] = frozenset()
    """Of the samples, settled or not, whose noise the choice has seen: it may choose no window for another one of theirs."""
    adaptive: bool = False
    """Whether one sample's windows follow from how others fare: then the samples of a run are not independent."""

    @abstractmethod
    def window(self, step: np.ndarray, under_way: Sequence[int], rows: int) -> int:
        """The next round's.

        Args:
            step: int64 [N], where the unfinished samples stood before the rounds under way.
            under_way: windows of the rounds that the host has not read.
            rows: samples in the batch, finished ones included.
        """

    def check_keys(self, keys: Collection[int], whose: str = "samples of the same seed", others: str = "seeds") -> None:
        """Raise a ValueError if the windows were chosen by samples of any of these keys, which they would bias.

        Args:
            keys: of those that the windows are for.
            whose, others: words for the message: who has the keys, and what has others.
        """
        if not self.keys.isdisjoint(keys):
            raise ValueError(
                f"window is a plan that was made from statistics of {whose}: it has seen their noise, and would bias them; "
                f"allowed are other {others}, or a plan that was made without statistics"
            )

    def learn(self, window: int, before: Known, after: Known) -> None:  # noqa: B027 - some know all from the start
        """What a round of ``window`` did, once the host has read it."""

    def time(self, window: int, states: int, seconds: float) -> None:  # noqa: B027 - most are not timed
        """What a round of ``window`` took, all of whose ``states`` counted, where rounds are timed as they pass."""

    def reach(self, process: ReverseProcess) -> torch.Tensor:
        """int64 [S]: the last step that a window from each step may settle."""
        return process.exact_step


class FixedWindow(Schedule):
    """The same in each round."""

    def __init__(self, window: int, name: str | None = None) -> None:
        self.widest, self.name = window, window if name is None else name

    def window(self, step: np.ndarray, under_way: Sequence[int], rows: int) -> int:
        return self.widest


@dataclass(frozen=True, eq=False)
class WindowPlan(Schedule):
    """A window for each step, made by :func:`free.plan_window`: as ``window="auto"`` would take, and the same in every run.

    A sample takes the windows of its own steps, whatever the others in its batch do. A plan that was made from statistics of
    real samples remembers their keys, and is refused for them: it has seen their noise.

    Raises:
        ValueError: windows that are not positive ints.
    """

    windows: np.ndarray
    """int64 [S]."""
    acceptance: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """float64 [S]: of a draft, as the plan was made with."""
    seconds: dict[int, float] = field(default_factory=dict)
    """Of a round of the whole batch, by window."""
    keys: Set[int] = frozenset()

    def __post_init__(self) -> None:
        windows = np.asarray(self.windows)
        if windows.ndim != 1 or not len(windows) or windows.dtype.kind not in "iu" or (windows < 1).any():
            raise ValueError(f"windows is {self.windows!r}; allowed are ints, 1 or more, one a step")
        object.__setattr__(self, "windows", windows.astype(np.int64))
        object.__setattr__(self, "keys", frozenset(map(int, self.keys)))

    @property
    def widest(self) -> int:  # type: ignore[override]
        return int(self.windows.max())

    @property
    def name(self) -> str:  # type: ignore[override]
        return "plan"

    def window(self, step: np.ndarray, under_way: Sequence[int], rows: int) -> int:
        # each sample's own is wanted whole, wherever the rounds under way have brought it
        farthest = sum(under_way)
        return max(int(self.windows[at + len(under_way) : at + farthest + 1].max(initial=1)) for at in step.tolist())

    def reach(self, process: ReverseProcess) -> torch.Tensor:
        if len(self.windows) != process.num_steps:
            raise ValueError(f"window is a plan of {len(self.windows)} steps; the process has {process.num_steps}")
        device = process.exact_step.device
        own = torch.arange(process.num_steps, device=device) + torch.from_numpy(self.windows).to(device) - 1
        return torch.minimum(process.exact_step, own)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Raises:
            OSError: the file cannot be written.
        """
        seconds = {str(window): value for window, value in self.seconds.items()}
        values = {"windows": self.windows.tolist(), "acceptance": self.acceptance.tolist()}
        values |= {"seconds": seconds, "keys": sorted(self.keys)}
        Path(path).write_text(json.dumps({"format": _FORMAT, **values}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> WindowPlan:
        """What :meth:`save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: it holds something else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values["format"] != _FORMAT:
                raise ValueError(f"its format is {values['format']!r}")
            seconds = {int(window): float(value) for window, value in values["seconds"].items()}
            acceptance = np.asarray(values["acceptance"], dtype=float)
            return cls(np.asarray(values["windows"]), acceptance, seconds, frozenset(values["keys"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} holds no window plan: {error}") from error


def check_window(window: Any) -> None:
    """Raise a ValueError unless ``window`` is a positive int, ``"auto"`` or a plan."""
    fits = isinstance(window, WindowPlan) or (isinstance(window, str) and window == "auto")
    if not fits and not (is_int(window) and window >= 1):
        raise ValueError(f"window is {window!r}; allowed is an int, 1 or more, 'auto', or a plan of free.plan_window")


def schedule_of(window: int | str | WindowPlan) -> Schedule | None:
    """The schedule that a checked ``window`` stands for; None has to be measured, by
    :func:`free.sampling.planning.auto_window`.
    """
    if isinstance(window, WindowPlan):
        return window
    return None if isinstance(window, str) else FixedWindow(int(window))
