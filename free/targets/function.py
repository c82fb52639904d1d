"""Any network as a function: diffusion policies, U-Nets, analytic models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from free.checks import check_labels
from free.targets.base import Target, TargetOutput, check_output, has_rows

# between the names of dicts within dicts
_WITHIN = " > "


def _flat(conditioning: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Dicts of tensors within the conditioning, which have one row a sample as well, under names of one level."""
    flat: dict[str, Any] = {}
    for name, value in conditioning.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{above}{name}{_WITHIN}")
        else:
            flat[f"{above}{name}"] = as_tensor(value)
    return flat


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """As the model takes it."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *above, name = path.split(_WITHIN)
        inner = nested
        for one in above:
            inner = inner.setdefault(one, {})
        inner[name] = value
    return nested


def as_tensor(value: Any) -> Any:
    """NumPy arrays have one row a sample too."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        return value
    # networks compute in float32, which NumPy's float64 is mostly meant to be
    return torch.from_numpy(value.astype(np.float32) if value.dtype == np.float64 else value.copy())


class CallableTarget(Target):
    """``model(x, timestep, **conditioning) -> output``, x [N, ...] of any rank, timestep [N], output of x's shape.

    Conditioning tensors and NumPy arrays, in dicts of any depth, have one row a sample; what else there is, lists of tensors
    included, is passed through as it is. An output object with ``.sample`` (diffusers' habit) or a tuple is unpacked.
    Guidance needs ``null_conditioning``.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        max_forward_batch: int | None = None,
        null_conditioning: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, max_forward_batch)
        self.null_conditioning = null_conditioning
        self._null_rows: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
        """Of :attr:`null_conditioning`, as forwards have asked for them: a graph cannot bring them to the device."""

    def check_ready(self) -> None:
        super().check_ready()
        self._null_rows = {}  # it may have changed since the last run

    def check_conditioning(
        self, class_labels: Any, conditioning: dict[str, Any] | None, guidance_scale: float, batch: int | None
    ) -> tuple[dict[str, Any], int | None]:
        if conditioning is not None and not isinstance(conditioning, dict):
            raise ValueError(f"conditioning is a {type(conditioning).__name__}; allowed is a dict of the model's keywords")
        checked = _flat(conditioning or {})
        if class_labels is not None:
            if "class_labels" in checked:
                raise ValueError("class_labels is given twice, as an argument and in conditioning; give it once")
            labels = check_labels(class_labels)
            checked["class_labels"] = labels.expand(batch or 1) if labels.dim() == 0 else labels
        sizes = {name: value.shape[0] for name, value in checked.items() if has_rows(value)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"conditioning has tensors of different batch sizes: {sizes}; they must agree")
        if guidance_scale != 1.0:
            if self.null_conditioning is None:
                raise ValueError(
                    f"guidance_scale is {guidance_scale}, but the model has no unconditional half; use guidance_scale=1, or "
                    "free.as_target(model, null_conditioning={...})"
                )
            if set(_flat(self.null_conditioning)) != set(checked):
                raise ValueError(
                    f"null_conditioning has {sorted(_flat(self.null_conditioning))}; conditioning has {sorted(checked)}: "
                    "they must name the same keywords"
                )
        return checked, next(iter(sizes.values()), None)

    def forward(
        self, states: torch.Tensor, timestep: torch.Tensor, conditioning: dict[str, Any], guided: bool
    ) -> TargetOutput:
        rows = len(states)
        inputs = states.to(self._input_dtype)
        if guided:
            if self.null_conditioning is None:  # a drafter's: the target's was checked with the caller's arguments
                raise ValueError(
                    "guidance is asked of a model without an unconditional half; use free.as_target(model, "
                    "null_conditioning={...})"
                )
            inputs, timestep = torch.cat((inputs, inputs)), torch.cat((timestep, timestep))
            conditioning = {
                name: torch.cat((value, self._null(name, value).expand_as(value))) if has_rows(value) else value
                for name, value in conditioning.items()
            }
        output = self.model(inputs, timestep, **_nested(conditioning))
        output = getattr(output, "sample", output)
        if isinstance(output, tuple) and output:
            output = output[0]
        output = check_output(output, inputs)
        if output.dtype == torch.float64:
            output = output.float()
        return TargetOutput(output[:rows], output[rows:] if guided else None)

    def _null(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The null of one keyword for the rows of its conditional tensor."""
        known = (name, value.dtype, value.device)
        if known not in self._null_rows:
            assert self.null_conditioning is not None
            null = torch.as_tensor(_flat(self.null_conditioning)[name], dtype=value.dtype, device=value.device)
            if tuple(null.shape) not in (tuple(value.shape[1:]), (1, *value.shape[1:])):
                raise ValueError(
                    f"null_conditioning[{name!r}] has shape {tuple(null.shape)}; allowed is {tuple(value.shape[1:])}, "
                    "with or without a leading axis of 1"
                )
            self._null_rows[known] = null
        return self._null_rows[known]
