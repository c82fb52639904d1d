"""A target whose evaluation is split over processes, state by state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from free.parallel.digest import checksum
from free.parallel.group import Group, RankError, group_of
from free.processes import ReverseProcess
from free.sampling.loop import NonFiniteOutputError
from free.targets import Target, TargetOutput, as_target
from free.targets.base import take_rows

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup


class WindowParallel(Target):
    """A model whose states are evaluated by R processes, a share of ceil(N / R) each, and known to all of them.

    Each process holds the whole model (or its part of it, where another axis of the mesh splits that), and calls the sampler
    with the same arguments, as ``torchrun`` starts them; all draw the same noise, draft and verify the same windows, and
    return the same samples. A round of W states then takes about as long as one of W / R, and an exchange: per round and
    process W·B·D outputs and the B settled states (those of rank 0, whose word holds). Rows are split with their guidance
    halves, and those that are missing of a last share are evaluated twice, so that all shapes are known beforehand.

    Samples have the law of the model as it is executed: R times smaller a batch. Where a row's bits do not depend on its
    batch they are those of one process.

    What goes wrong on one process ends the call on all, with its message: :class:`free.RankError`. Unlike arguments or
    weights are found before any work is done. A process that is killed ends the others within the group's timeout.

    Args:
        model: anything :func:`free.as_target` takes, on this process's device.
        group: a ``torch.distributed`` process group, a device mesh of one axis (``mesh["window"]``), or None for all
            processes. It needs gloo for the hosts beside what the device needs:
            ``init_process_group("cpu:gloo,cuda:nccl")``. In a group of one nothing is split.

    Raises:
        ValueError: a group that is none of those, or ``torch.distributed`` is not initialised.
        TypeError: a model that :func:`free.as_target` does not take.
    """

    def __init__(self, model: Any, group: ProcessGroup | DeviceMesh | None = None) -> None:
        self.target = target = as_target(model)
        ranks = group_of(group)
        super().__init__(target.model, target.max_forward_batch)
        self.ranks = ranks
        self.sample_shape, self.feature_shape = target.sample_shape, target.feature_shape
        self.of_latents, self.learns_variance = target.of_latents, target.learns_variance
        self._apart: torch.Tensor | None = None
        """bool, on the device: whether some process was asked about other states than the rest."""

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        return self.target.capturable and self.ranks.size == 1

    @property
    def bytes(self) -> Counter[str]:
        """What each process has received so far: ``"outputs"`` and ``"settled"`` states from the devices, ``"words"`` from
        the hosts."""
        return Counter(self.ranks.bytes) if isinstance(self.ranks, Group) else Counter()

    def check_ready(self) -> None:
        self.target.check_ready()

    @property
    def device(self) -> torch.device | None:
        return self.target.device

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype

    def default_process(self, num_inference_steps: int) -> ReverseProcess:
        return self.target.default_process(num_inference_steps)

    def check_conditioning(
        self, class_labels: Any, conditioning: dict[str, Any] | None, guidance_scale: float, batch: int | None
    ) -> tuple[dict[str, Any], int | None]:
        return self.target.check_conditioning(class_labels, conditioning, guidance_scale, batch)

    def label_embedding(self, conditioning: dict[str, Any]) -> torch.Tensor:
        return self.target.label_embedding(conditioning)

    def forward(
        self, states: torch.Tensor, timestep: torch.Tensor, conditioning: dict[str, Any], guided: bool
    ) -> TargetOutput:
        return self.target.forward(states, timestep, conditioning, guided)

    def forward_batch(self, guided: bool) -> int | None:
        limit = self.target.forward_batch(guided)
        return None if limit is None else limit * self.ranks.size

    def evaluate(
        self, states: torch.Tensor, timestep: torch.Tensor, conditioning: dict[str, Any], guided: bool
    ) -> TargetOutput:
        """As :meth:`free.Target.evaluate`, on all processes with the same states; each evaluates its share.

        Raises:
            RankError: a process has raised, has ended, or is elsewhere.
        """
        ranks, total = self.ranks, len(states)
        if not isinstance(ranks, Group):
            return self.target.evaluate(states, timestep, conditioning, guided)
        share = -(-total // ranks.size)
        # the last shares may lack rows: the last one stands in for them
        rows = (torch.arange(share, device=states.device) + ranks.rank * share).clamp(max=total - 1)
        own = self.target.evaluate(states[rows], timestep[rows], take_rows(conditioning, rows), guided)
        asked = checksum(states, timestep)[None]  # int64 [1]
        gathered = ranks.gather(total, (asked, own.output, own.unconditional, own.feature, own.variance_share))
        everybody_asked, output, *rest = gathered  # [R] and [R * share, ...] each
        assert everybody_asked is not None
        assert output is not None
        apart = (everybody_asked != everybody_asked[0]).any()
        self._apart = apart if self._apart is None else self._apart | apart
        # answers to other states than those that were drafted here must not decide anything
        output = torch.where(apart, torch.nan, output)
        return TargetOutput(output[:total], *(None if part is None else part[:total] for part in rest))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        self._apart = self._apart if self.runs else None
        with self.target.in_use(), super().in_use():
            try:
                yield
            except NonFiniteOutputError as error:
                if self._apart is None or not bool(self._apart):
                    raise
                raise RankError(
                    "the ranks have drafted different states from the same evaluations: they compute differently (another "
                    "device, library or number of threads, or a drafter that is not a function of what it is given)"
                ) from error

    @contextmanager
    def capture_features(self) -> Iterator[None]:
        with self.target.capture_features():
            yield

    @contextmanager
    def capture_variance(self) -> Iterator[None]:
        with self.target.capture_variance():
            yield

    @contextmanager
    def compile(self, *, dynamic: bool | None = True, **options: Any) -> Iterator[None]:
        before = self.compiled
        with self.target.compile(dynamic=dynamic, **options):
            self.compiled = True
            try:
                yield
            finally:
                self.compiled = before
