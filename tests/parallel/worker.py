"""What each of four processes does: ``python -m tests.parallel.worker RANK FOLDER``, a JSON file of results a process.

They are started once, as importing torch takes seconds; a pair and three of them are groups of their own. Results are a
case's, by name and number of processes; what was raised is one too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import free
from tests.analytic import ElementwiseTarget
from tests.parallel import cases

SIZE = 4
TIMEOUT = 30.0
"""Seconds, of the groups."""
GROUPS = {2: [0, 1], 3: [0, 1, 2], 4: [0, 1, 2, 3]}


class Weighted(torch.nn.Module):
    """One weight, and what happens at its calls."""

    def __init__(self, weight: float = 1.0, at_call: dict[int, Callable[[], Any]] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([weight]), requires_grad=False)
        self._at_call, self._calls = at_call or {}, 0
        self.eval()

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        replaced = self._at_call.get(self._calls, lambda: None)()
        return self.weight * ElementwiseTarget()(x, timestep) if replaced is None else torch.full_like(x, replaced)


class Whim(free.StepDrafter):
    """Drafts as its process likes."""

    name = "whim"

    def __init__(self, whim: float) -> None:
        self._whim = whim

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: free.Situation) -> torch.Tensor:
        return state * self._whim


class Worker:
    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder = rank, folder
        self.results: dict[str, Any] = {}
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), SIZE),
            rank=rank,
            world_size=SIZE,
            timeout=timedelta(seconds=TIMEOUT),
        )
        self.groups = {size: dist.new_group(ranks, timeout=timedelta(seconds=TIMEOUT)) for size, ranks in GROUPS.items()}

    def run(self) -> None:
        for size, ranks in GROUPS.items():
            if self.rank in ranks:
                self.draws(size)
        self.failures(4)
        self.unlike(4)
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("window", "tensor"))
        self.case("mesh", 4, lambda: self.draw("uneven", mesh["window"]))
        for name, group in {"mesh of two axes": mesh, "not a member": self.groups[2]}.items():
            self.case(name, 4, lambda group=group: free.WindowParallel(ElementwiseTarget(), group).ranks.size)
        self.save("results")
        self.case("killed", 4, lambda: self.sample(self.on_rank(3, 2, self.kill)))
        self.save("survivors")

    def save(self, name: str) -> None:
        (self.folder / f"{name}-{self.rank}.json").write_text(json.dumps(self.results), encoding="utf-8")

    def case(self, name: str, size: int, run: Callable[[], Any]) -> None:
        """Keep what ``run`` returns, or raises."""
        try:
            result = run()
        except (Exception, KeyboardInterrupt) as error:
            result = {"error": type(error).__name__, "message": str(error)}
        self.results[f"{name}@{size}"] = result

    # --- what is drawn --------------------------------------------------------------------------------------------------

    def draws(self, size: int) -> None:
        for name in cases.DRAWN if size == 3 else cases.EVERYWHERE:
            self.case(name, size, lambda name=name: self.draw(name, self.groups[size]))
        self.case("bytes", size, lambda: self.bytes(size))
        if size == 3:
            self.chosen(size)

    def chosen(self, size: int) -> None:
        """By what rounds take."""
        model = ElementwiseTarget()
        for name, seeds in {"auto": [3, 4], "auto again": [5, 6], "auto, shared key": [7, 7]}.items():
            self.case(name, size, lambda seeds=seeds: self.auto(free.WindowParallel(model, self.groups[size]), seeds))
        self.case("plan", size, lambda: self.plan(free.WindowParallel(model, self.groups[size])))

    def draw(self, name: str, group: Any) -> dict[str, Any]:
        return cases.draw(name, lambda model: free.WindowParallel(model, group))

    def auto(self, target: free.WindowParallel, seeds: list[int]) -> dict[str, Any]:
        if self.rank == 1:  # one process knows the model already, and takes other windows for it
            free.speculative_sample(target.target, window="auto", shape=(6,), seed=[11, 12], num_inference_steps=30)
        output = free.speculative_sample(target, window="auto", shape=(6,), seed=seeds, num_inference_steps=30)
        return {"samples": output.samples.tolist(), "windows": sorted(output.stats.windows.items())}

    def plan(self, target: free.WindowParallel) -> dict[str, Any]:
        plan = free.plan_window(target, shape=(6,), num_inference_steps=12)
        output = free.speculative_sample(target, window=plan, shape=(6,), seed=1, num_inference_steps=12)
        return {"windows": plan.windows.tolist(), "samples": output.samples.tolist()}

    def bytes(self, size: int) -> dict[str, Any]:
        """Of a run whose rounds are all alike: one sample, whose windows are whole but for the last."""
        target = free.WindowParallel(ElementwiseTarget(), self.groups[size])
        free.speculative_sample(target, ElementwiseTarget(), window=8, shape=(64,), seed=1, num_inference_steps=24)
        return dict(target.bytes)

    # --- what goes wrong ------------------------------------------------------------------------------------------------

    def on_rank(self, rank: int, call: int, do: Callable[[], Any]) -> Weighted:
        return Weighted(at_call={call: do} if self.rank == rank else None)

    def sample(self, model: Any, drafter: Any = "hold-x0", *, size: int = 4, **given: Any) -> list[Any]:
        """At the group's call; each process may give other things."""
        target = free.WindowParallel(model, self.groups[size])
        settings = {"shape": (6,), "seed": [1, 2], "num_inference_steps": 12, "window": 4, **given}
        return free.speculative_sample(target, drafter, **settings).samples.tolist()

    def failures(self, size: int) -> None:
        def fail() -> None:
            raise ValueError("no luck")

        def interrupt() -> None:
            raise KeyboardInterrupt

        def called_back(*_: Any) -> None:
            if self.rank == 1:
                fail()

        def uncertain(drafted: free.DraftedSteps) -> torch.Tensor:
            if self.rank == first_or_last:
                fail()
            return torch.zeros(drafted.step.shape)

        self.case("NaN", size, lambda: self.sample(self.on_rank(2, 3, lambda: float("nan"))))
        self.case("raises", size, lambda: self.sample(self.on_rank(2, 2, fail)))
        self.case("interrupted", size, lambda: self.sample(self.on_rank(0, 2, interrupt)))
        self.case("callback", size, lambda: self.sample(Weighted(), callback_on_step_end=called_back))
        for first_or_last in (0, 3):  # what a round settles is sent by the first
            relaxation = free.Relaxation(1.0, uncertain)
            self.case(f"settles {first_or_last}", size, lambda: self.sample(Weighted(), relaxation=relaxation))  # noqa: B023
        self.case("whim", size, lambda: self.sample(Weighted(), Whim(0.1 + 0.1 * (self.rank == 3))))
        self.case("afterwards", size, lambda: self.sample(Weighted()))

    def unlike(self, size: int) -> None:
        odd = self.rank == 2
        self.case("unlike seed", size, lambda: self.sample(Weighted(), seed=[1, 3 if odd else 2]))
        self.case("unlike window", size, lambda: self.sample(Weighted(), window=5 if odd else 4))
        self.case("unlike weights", size, lambda: self.sample(Weighted(2.0 if odd else 1.0)))
        self.case("unlike drafter", size, lambda: self.sample(Weighted(), "gains" if odd else "hold-x0"))
        self.case("unlike process", size, lambda: self.sample(Weighted(), num_inference_steps=13 if odd else 12))
        latents = torch.full((2, 6), 0.5 if odd else 0.25)
        self.case("unlike latents", size, lambda: self.sample(Weighted(), latents=latents))

        def another_call() -> Any:
            target = free.WindowParallel(Weighted(), self.groups[size])
            sample = free.ancestral_sample if odd else free.speculative_sample
            return sample(target, shape=(6,), seed=1, num_inference_steps=4).samples.tolist()

        self.case("unlike call", size, another_call)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Worker(int(sys.argv[1]), Path(sys.argv[2])).run()
