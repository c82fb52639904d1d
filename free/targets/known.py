"""A network whose samples are known in part: the goal, the first action, the pixels that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from free.targets.base import TargetOutput
from free.targets.function import CallableTarget, as_tensor

KNOWN = "known"
"""Keyword of the known values among the conditioning."""


class KnownEntries(CallableTarget):
    """``model`` over samples of which some entries are known: only the others are sampled.

    The network sees whole samples, the known entries as they are, without noise (as Diffuser, Janner et al. 2022, and
    diffusion policies are conditioned); what it says of those is not used. So the chain has the other entries alone as its
    state, and both samplers draw from the same law. :meth:`whole` puts a sample together.

    Args:
        model: as in :class:`CallableTarget`.
        mask: bool, the shape of a whole sample: True where it is known.
        max_forward_batch, null_conditioning: as in :class:`CallableTarget`.

    The conditioning has the whole samples [B, *shape] as ``"known"``, of which the known entries are read.

    Raises:
        ValueError: a mask that is no bool tensor, or that leaves nothing to sample.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        mask: torch.Tensor,
        *,
        max_forward_batch: int | None = None,
        null_conditioning: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or not mask.dim():
            given = f"dtype {mask.dtype}" if isinstance(mask, torch.Tensor) else f"type {type(mask).__name__}"
            raise ValueError(f"the mask of known entries has {given}; allowed is a bool tensor of a sample's shape")
        if mask.all():
            raise ValueError("the mask of known entries is True everywhere; allowed is one that leaves something to sample")
        super().__init__(model, max_forward_batch=max_forward_batch, null_conditioning=null_conditioning)
        self.whole_shape = tuple(mask.shape)
        free = ~mask.cpu()
        rows = free.flatten(1).any(1) if mask.dim() > 1 else free
        in_rows = mask.dim() > 1 and bool((free.flatten(1).all(1) == rows).all())
        # whole rows keep their place next to each other
        self.sample_shape = (int(rows.sum()), *mask.shape[1:]) if in_rows else (int(free.sum()),)
        self._free = {torch.device("cpu"): free.flatten().nonzero()[:, 0]}  # int64 [D]

    def check_conditioning(
        self, class_labels: Any, conditioning: dict[str, Any] | None, guidance_scale: float, batch: int | None
    ) -> tuple[dict[str, Any], int | None]:
        known = as_tensor((conditioning or {}).get(KNOWN))
        if not isinstance(known, torch.Tensor) or known.shape[1:] != self.whole_shape or not known.is_floating_point():
            given = f"shape {tuple(known.shape)}" if isinstance(known, torch.Tensor) else f"type {type(known).__name__}"
            allowed = ", ".join(map(str, self.whole_shape))
            raise ValueError(f"conditioning {KNOWN!r} has {given}; allowed is a floating tensor (samples, {allowed})")
        rest = {name: value for name, value in (conditioning or {}).items() if name != KNOWN}
        checked, count = super().check_conditioning(class_labels, rest, guidance_scale, batch)
        if count not in (None, len(known)):
            raise ValueError(f"conditioning {KNOWN!r} has {len(known)} rows; the rest of the conditioning has {count}")
        return {**checked, KNOWN: known.to(torch.float32)}, len(known)

    def forward(
        self, states: torch.Tensor, timestep: torch.Tensor, conditioning: dict[str, Any], guided: bool
    ) -> TargetOutput:
        rest = {name: value for name, value in conditioning.items() if name != KNOWN}
        output = super().forward(self.whole(states, conditioning[KNOWN]), timestep, rest, guided)
        unconditional = None if output.unconditional is None else self.unknown(output.unconditional)
        return TargetOutput(self.unknown(output.output), unconditional)

    def whole(self, samples: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Samples [N, *sample shape] and known values [N, *whole shape] as whole samples [N, *whole shape]."""
        return known.flatten(1).index_copy(1, self._index(samples), samples.flatten(1)).unflatten(1, self.whole_shape)

    def unknown(self, whole: torch.Tensor) -> torch.Tensor:
        """What is sampled of whole samples [N, *whole shape], [N, *sample shape]."""
        assert self.sample_shape is not None
        return whole.flatten(1)[:, self._index(whole)].unflatten(1, self.sample_shape)

    def _index(self, values: torch.Tensor) -> torch.Tensor:
        """Places of the sampled entries among all, on the device of ``values``."""
        if values.device not in self._free:
            self._free[values.device] = self._free[torch.device("cpu")].to(values.device)
        return self._free[values.device]
