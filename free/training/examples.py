"""What a drafter learns from: states, what it may know, and what the target says there. Made on the fly, never stored."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from free.drafters import Anchor
from free.processes import ReverseProcess


@dataclass
class Examples:
    """N drafts that a drafter could have made."""

    process: ReverseProcess
    state: torch.Tensor
    """float32 [N, D], what the block sees."""
    step: torch.Tensor
    """int64 [N]."""
    anchor: Anchor
    label_embedding: torch.Tensor
    """[N, width]."""
    feature: torch.Tensor | None
    """[N, tokens, width], of an earlier step."""
    wanted: torch.Tensor
    """float32 [N, D]: the target's guided output, or with a base what its draft misses of it."""
    next_feature: torch.Tensor | None
    """[N, tokens, width]: the target's at this step."""
    weight: torch.Tensor
    """float32 [N]."""
    tested: torch.Tensor
    """bool [N]: whether a draft like this is tested; those beyond a rejection decide nothing."""
    answer: torch.Tensor | None = None
    """float32 [N, D], what gains add to hold-x0's draft of ``state``, where they are the base."""


def together(parts: list[Examples]) -> Examples:
    """The rows of all parts, which share their process."""

    def joined(values: list[Any]) -> Any:
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values)
        if isinstance(values[0], Anchor):
            return Anchor(*(joined([getattr(value, entry.name) for value in values]) for entry in fields(Anchor)))
        return values[0]

    return Examples(*(joined([getattr(part, entry.name) for part in parts]) for entry in fields(Examples)))
