"""An engine whose slots are refilled: the law of its samples, and whether the load has told one of its own noise."""

from __future__ import annotations

from collections.abc import Callable

import torch

import free
from tests.analytic import GaussianTarget
from tests.statistical import laws
from tests.statistical.keys import Line, Off, by_step
from tests.statistical.laws import PValues

DIM = 6


def refilled_slots() -> PValues:
    """Samples that follow each other in a few slots: of the closed-form law, and of each other independent."""
    samples, slots = 3000, 32
    model, process = GaussianTarget.example(DIM), free.ReverseProcess.ddpm(10)
    engine = free.Engine(
        model, "gains", slots=slots, window={8: 6, slots: 4}, shape=(DIM,), process=process, impl="reference"
    )
    handles = []
    # a part of them at a time, so that the load falls and rises
    for first in range(0, samples, 500):
        handles += [engine.add(seed=2**33 + first + i) for i in range(500)]
        while engine.unfinished > slots // 8:
            engine.step()
    for _ in engine.run():
        pass
    drawn = torch.cat([handle.sample for handle in handles if handle.sample is not None])
    whitened = laws.whiten(drawn, *model.chain_moments(process))
    return {
        **{f"samples: {name}": value for name, value in laws.moments_p(whitened).items()},
        "samples against those before them": laws.lags_p(whitened[None], 2 * slots),
    }


class Watched(Line):
    """Remembers the last state of each step that it saw in rows with a center of 0: the settled one."""

    def __init__(self) -> None:
        self.state: dict[int, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, center: torch.Tensor | None = None) -> torch.Tensor:
        assert center is not None
        for state, step, at in zip(x, timestep.tolist(), center[:, 0].tolist(), strict=True):
            if at == 0:
                self.state[step] = state.double()
        return super().__call__(x, timestep, center)


def load_of_a_key_in_two_slots() -> PValues:
    """Windows by load, and a key in two slots: when the one ahead is finished tells of noise that the other comes to."""
    process = free.ReverseProcess.ddpm(4)

    def one(seed: int) -> torch.Tensor:
        model = Watched()
        engine = free.Engine(model, Off(), slots=2, window={1: 3, 2: 1}, shape=(1,), process=process, impl="reference")
        engine.add(seed=seed, conditioning={"center": torch.full((1, 1), 4.0)})
        engine.step()
        handle = engine.add(seed=seed, conditioning={"center": torch.zeros(1, 1)})
        for _ in engine.run():
            pass
        assert handle.sample is not None
        state = torch.stack([*(model.state[step] for step in process.timestep.tolist()), handle.sample[0].double()])[:, 0]
        mean = (process.state_coef.double() + 0.5 * process.model_coef.double()) * state[:-1]
        return ((state[1:] - mean) / process.std.double())[None, :-1]

    return by_step([one(20_000 + 7 * i) for i in range(300)])


CHECKS: dict[str, Callable[[], PValues]] = {
    "engine: refilled slots": refilled_slots,
    "engine: a key in two slots, by load": load_of_a_key_in_two_slots,
}
