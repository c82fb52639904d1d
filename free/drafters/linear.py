"""A calibrated drafter: between hold-x0 and hold-output, by step, by age of the anchor and by spatial frequency."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from free.checks import on_cpu
from free.drafters.base import Situation, StepDrafter
from free.drafters.patches import cosines
from free.outputs import check_folder
from free_kernels import NOISE_STREAM, Proposal, normal

if TYPE_CHECKING:
    from free.processes import ReverseProcess
    from free.targets import Target

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "linear_drafter.safetensors"
_FORMAT = "free-dit linear drafter, 1"


class Bands:
    """Bands of spatial frequency over the last two axes of an image-shaped sample [C, H, W].

    An orthonormal DCT-II takes a sample to its frequencies; band b of N holds those whose distance from the constant one,
    ``hypot(i / H, j / W)``, lies in [b / N, (b+1) / N), and the last band all beyond. Other samples have one band, and are
    their own frequencies.

    Args:
        sample_shape: of one sample.
        count: N.
    """

    @on_cpu
    def __init__(self, sample_shape: Sequence[int], count: int) -> None:
        self.sample_shape, self.count = tuple(sample_shape), count
        numel = math.prod(self.sample_shape)
        self.rows = self.columns = torch.ones(1, 1, dtype=torch.float32, device="cpu")
        self.index = torch.zeros(numel, dtype=torch.int64)
        """int64 [D]: the band of each frequency."""
        self.image = len(self.sample_shape) == 3 and count > 1
        if self.image:
            channels, height, width = self.sample_shape
            self.rows, self.columns = cosines(height).float(), cosines(width).float()
            distance = torch.hypot(
                torch.arange(height, dtype=torch.float64)[:, None] / height, torch.arange(width, dtype=torch.float64) / width
            )
            # the slack keeps a frequency that stands on an edge from falling below it by a rounding
            band = (distance * count + 1e-9).long().clamp(max=count - 1)
            self.index = band.expand(channels, height, width).flatten()

    def to(self, device: torch.device) -> Bands:
        """The same bands on another device."""
        moved = Bands(self.sample_shape, self.count)
        moved.rows, moved.columns, moved.index = self.rows.to(device), self.columns.to(device), self.index.to(device)
        return moved

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Frequencies [..., D] of samples [..., D]."""
        if not self.image:
            return values
        with _own_precision(values):
            return (self.rows @ values.unflatten(-1, self.sample_shape) @ self.columns.T).flatten(-3)

    def inverse(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Samples [..., D] of frequencies [..., D]."""
        if not self.image:
            return frequencies
        with _own_precision(frequencies):
            return (self.rows.T @ frequencies.unflatten(-1, self.sample_shape) @ self.columns).flatten(-3)


def _own_precision(values: torch.Tensor) -> AbstractContextManager[Any]:
    """It is the networks that a caller's autocast is meant for."""
    return nullcontext() if values.is_meta else torch.autocast(values.device.type, enabled=False)


@dataclass
class _Prepared:
    """What one process on one device needs, made once."""

    process: ReverseProcess
    bands: Bands
    weight: torch.Tensor
    """float32 [S, G, N]."""
    edges: torch.Tensor
    """int64 [G - 1]."""
    columns: torch.Tensor
    """float32 [S, 5]: state_coef, model_coef, std, x0_state_coef, 1 / x0_model_coef."""


class LinearDrafter(StepDrafter):
    """Blends hold-x0 and hold-output, with coefficients that :func:`free.calibrate` fits on a few trajectories.

    ``y_draft = hold_output + sum over b of w[k, g, b] * P_b(hold_x0 - hold_output)``, where P_b projects onto band b of
    spatial frequency (:class:`Bands`) and g is the bin of the anchor's age, step minus the anchor's step. With w = 1 it is
    hold-x0, with w = 0 hold-output. Like every drafter it is exact whatever the coefficients.

    Args:
        weight: w, [S, N], or [S, G, N] by age of the anchor; finite.
        timestep: [S], of the process that it is for.
        sample_shape: of the samples that it is for; N must be 1 unless it is [C, H, W].
        gap_edges: the G - 1 ages at which a new bin begins, ascending, 1 or more: (1, 3) has bins 0, 1 … 2, and 3 on.

    Raises:
        ValueError: arguments that do not fit each other.
    """

    name = "linear"
    capturable = True

    def __init__(
        self, weight: torch.Tensor, timestep: torch.Tensor, sample_shape: Sequence[int], gap_edges: Sequence[int] = ()
    ) -> None:
        self.sample_shape, self.gap_edges = tuple(sample_shape), tuple(gap_edges)
        if not self.sample_shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.sample_shape):
            raise ValueError(f"sample_shape is {self.sample_shape}; allowed are positive ints")
        edges = (0, *self.gap_edges)
        integers = all(isinstance(n, int) and not isinstance(n, bool) for n in edges)
        if not integers or any(a >= b for a, b in itertools.pairwise(edges)):
            raise ValueError(f"gap_edges is {self.gap_edges}; allowed are ascending ints, 1 or more")
        if timestep.dim() != 1 or not len(timestep):
            raise ValueError(f"timestep has shape {tuple(timestep.shape)}; allowed is (steps,) with at least one step")
        weight = weight[:, None] if weight.dim() == 2 else weight
        if weight.dim() != 3 or weight.shape[:2] != (len(timestep), len(edges)) or not weight.shape[2]:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; allowed is ({len(timestep)}, {len(edges)}, bands): "
                "a row for each step, one for each bin of the anchor's age"
            )
        if weight.shape[2] > 1 and len(self.sample_shape) != 3:
            raise ValueError(
                f"weight has {weight.shape[2]} bands; samples of shape {self.sample_shape} have 1, as they are no images"
            )
        if not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
            raise ValueError(f"weight ({weight.dtype}) holds numbers that are not finite floats; allowed are finite floats")
        self.weight = weight.detach().to("cpu", torch.float32)
        """float32 [S, G, N]."""
        self.timestep = timestep.detach().cpu()
        """[S]."""
        self._prepared: _Prepared | None = None

    @property
    def num_steps(self) -> int:
        """S."""
        return self.weight.shape[0]

    @property
    def num_bands(self) -> int:
        """N."""
        return self.weight.shape[2]

    def check(self, target: Target) -> None:
        # the process, and the shape where the target does not know it, are checked before the first window is evaluated
        if target.sample_shape is not None:
            self._check_shape(target.sample_shape)

    def draft(self, state: torch.Tensor, step: torch.Tensor, situation: Situation) -> torch.Tensor:
        prepared = self._prepare(situation)
        anchor = situation.anchor(step)
        _, _, _, x0_state_coef, inverse = prepared.columns[step].unsqueeze(-1).unbind(1)
        hold_x0 = inverse * (anchor.x0(situation.process) - x0_state_coef * state)
        weight = _weight(step, anchor.step, prepared)
        bands = prepared.bands
        return anchor.output + bands.inverse(weight * bands.forward(hold_x0 - anchor.output))

    def propose(self, situation: Situation) -> Proposal:
        process, window = situation.process, situation.window
        prepared = self._prepare(situation)
        if window == 1 or process.clip_range is not None or process.memory is not None:
            return super().propose(situation)
        # without clipping and memory a draft is linear in the state and elementwise in frequency: a path of W-1 steps costs
        # two transforms, not 2 (W-1)
        batch, numel = situation.state.shape
        steps = situation.step[:, None] + torch.arange(window - 1, device=situation.step.device)
        steps = steps.clamp_(max=process.num_steps - 1)  # [B, W-1]
        noise = situation.noise
        if noise is None:
            noise = normal(situation.seed[:, None], steps, numel, stream=NOISE_STREAM, impl=situation.impl)
        anchor = situation.anchor(steps)
        state_coef, model_coef, std, x0_state_coef, inverse = prepared.columns[steps].unsqueeze(-1).unbind(2)
        scaled_noise = std * noise[:, : window - 1]
        weight = _weight(steps, anchor.step, prepared)  # [B, W-1, D]

        # frequencies of the output, less what hold-x0 takes off it for the state: y = held - pull * s
        x0 = inverse * anchor.x0(process)
        stacked = torch.cat((situation.state[:, None], anchor.output, x0, scaled_noise), 1)  # [B, 1 + 3 (W-1), D]
        state, output, x0, drive = prepared.bands.forward(stacked).split((1, *(window - 1,) * 3), 1)
        held = torch.lerp(output, x0, weight)
        pull = weight * (inverse * x0_state_coef)
        slope = state_coef - model_coef * pull
        drive = torch.addcmul(drive, model_coef, held)
        path = [state[:, 0]]
        for a, b in zip(slope.unbind(1)[:-1], drive.unbind(1), strict=False):
            path.append(torch.addcmul(b, a, path[-1]))
        drafts = prepared.bands.inverse(torch.addcmul(held, pull, torch.stack(path, 1), value=-1))  # [B, W-1, D]

        # the states are made of the drafts as they are, so that a transform's rounding is part of the draft, not of the law
        states = situation.state.new_empty(batch, window, numel)
        states[:, 0] = situation.state
        drive = torch.addcmul(scaled_noise, model_coef, drafts)
        following = states.unbind(1)
        for j, (a, b) in enumerate(zip(state_coef.unbind(1), drive.unbind(1), strict=True)):
            torch.addcmul(b, a, following[j], out=following[j + 1])
        return Proposal(states, drafts)

    def _prepare(self, situation: Situation) -> _Prepared:
        """Tables on the process's device; raises a ValueError for another process or sample shape than its own."""
        prepared, process = self._prepared, situation.process
        if prepared is not None and prepared.process is process and prepared.bands.sample_shape == situation.sample_shape:
            return prepared
        self._check_shape(situation.sample_shape)
        self._check_process(process)
        device = process.std.device
        columns = (
            process.state_coef,
            process.model_coef,
            process.std,
            process.x0_state_coef,
            process.x0_model_coef.reciprocal(),
        )
        # returned as it was made: another thread may put that of its own process in its place
        self._prepared = prepared = _Prepared(
            process,
            Bands(self.sample_shape, self.num_bands).to(device),
            self.weight.to(device),
            torch.tensor(self.gap_edges, dtype=torch.int64, device=device),
            torch.stack(columns, -1),
        )
        return prepared

    def _check_shape(self, sample_shape: tuple[int, ...]) -> None:
        if tuple(sample_shape) != self.sample_shape:
            raise ValueError(
                f"linear drafter was fitted to samples of shape {self.sample_shape}; the target's are {tuple(sample_shape)}"
            )

    def _check_process(self, process: ReverseProcess) -> None:
        if process.num_steps != self.num_steps:
            raise ValueError(
                f"linear drafter was fitted to a process of {self.num_steps} steps; this one has {process.num_steps}"
            )
        timestep = process.timestep.cpu()
        different = (timestep.double() != self.timestep.double()).nonzero()[:, 0]
        if len(different):
            k = int(different[0])
            raise ValueError(
                f"linear drafter was fitted to timestep {self.timestep[k].item()} at step {k}; "
                f"this process has {timestep[k].item()} there"
            )

    @classmethod
    def check_folder(cls, name: str, folder: Path) -> None:
        """Say what is in the way of :meth:`save_pretrained` to ``folder``, which is the argument ``name``."""
        check_folder(name, folder, _FORMAT)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and one small safetensors file into ``folder``, which is made if it is not there.

        Raises:
            OSError: the folder cannot be made or written to.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": _FORMAT,
            "num_steps": self.num_steps,
            "num_bands": self.num_bands,
            "sample_shape": list(self.sample_shape),
            "gap_edges": list(self.gap_edges),
        }
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {"weight": self.weight.contiguous(), "timestep": self.timestep.contiguous()}
        (folder / WEIGHTS_NAME).write_bytes(save(tensors))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LinearDrafter:
        """Load what :meth:`save_pretrained` wrote.

        Raises:
            ValueError: a file is missing, corrupt, truncated, or does not fit the other.
        """
        folder = Path(folder)
        config = _read_config(folder / CONFIG_NAME)
        weights = folder / WEIGHTS_NAME
        try:
            tensors = load_file(str(weights))
            weight, timestep = tensors["weight"], tensors["timestep"]
        except FileNotFoundError:
            raise ValueError(f"no {WEIGHTS_NAME} in {str(folder)!r}; save_pretrained writes it") from None
        except KeyError as error:
            raise ValueError(f"{str(weights)!r} holds no tensor {error}") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(weights)!r} is corrupt or truncated: {error}") from error
        shape = (config["num_steps"], len(config["gap_edges"]) + 1, config["num_bands"])
        if tuple(weight.shape) != shape:
            raise ValueError(f"{str(weights)!r} holds weight of shape {tuple(weight.shape)}; {CONFIG_NAME} says {shape}")
        return cls(weight, timestep, config["sample_shape"], config["gap_edges"])


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no {path.name} in {str(path.parent)!r}; save_pretrained writes it") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is corrupt or truncated: {error}") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        found = config.get("format") if isinstance(config, dict) else config
        raise ValueError(f"{str(path)!r} has format {found!r}; allowed is {_FORMAT!r}")
    for key, kind in (("num_steps", int), ("num_bands", int), ("sample_shape", list), ("gap_edges", list)):
        if not isinstance(config.get(key), kind):
            raise ValueError(f"{str(path)!r} has {key} {config.get(key)!r}; allowed is a {kind.__name__}")
    return config


def _weight(step: torch.Tensor, anchor_step: torch.Tensor, prepared: _Prepared) -> torch.Tensor:
    """w of each frequency, [*step.shape, D]."""
    age = torch.bucketize(step - anchor_step, prepared.edges, right=True)
    return prepared.weight[step, age][..., prepared.bands.index]
