"""How samples of any shape are cut into patches, and the frequencies of a patch into bands."""

from __future__ import annotations

import functools
import math

import torch

from free.checks import on_cpu
from free_kernels import Patches
from free_kernels.patches import MAX_COLUMNS, MAX_ROWS

_RINGS = 32
"""Rings of equal width in frequency, from 0 to the highest of one axis."""
_APART = 16
"""Up to so many channels have gains of their own; with more, all share one set."""
_COLOURS = 3
_OPPONENT = ((1, 1, 1), (1, 0, -1), (1, -2, 1))
"""Three channels are taken for colours: their sum, and two differences, which know little of one another."""
_SMALL = 256
"""Samples of at most so many numbers are not transformed: each number has its own gain."""


@functools.cache
@on_cpu
def patches_of(sample_shape: tuple[int, ...], device: torch.device) -> Patches:
    """Patches of the last axes of a sample: of all of one or two, else of the last two, or three where there are four.

    The axes before are channels. A patch is as large as the operations take it and divides its axes; its frequencies are
    those of an orthonormal DCT-II along each, its bands those whose distance from the constant one,
    ``hypot(i / H, j / W, ...)`` for a patch H by W, is the same in steps of 1 / 32. Three channels of two axes are mixed
    first into their sum and two differences. In a sample of few numbers each of them is a band, untransformed. Kept for each
    shape and device, as captured rounds read them.
    """
    if math.prod(sample_shape) <= _SMALL:
        return each_number(sample_shape, device)
    return rings(sample_shape, device)


def rings(sample_shape: tuple[int, ...], device: torch.device) -> Patches:
    """Bands of frequency."""
    numel = math.prod(sample_shape)
    axes = len(sample_shape) if len(sample_shape) < 3 else min(len(sample_shape) - 1, 3)
    *leading, rows, columns = (1, 1, *sample_shape)
    channels, frames = (math.prod(leading[:-1]), leading[-1]) if axes == 3 else (math.prod(leading), 1)
    colours = _COLOURS if axes == 2 and len(sample_shape) == 3 and channels == _COLOURS else 1
    sides = _sides(frames, rows, columns)

    # [channels, frames, rows, columns] -> [groups, patches, rows of a patch, columns of a patch]
    cut = torch.arange(numel).view(
        channels // colours, colours, frames // sides[0], sides[0], rows // sides[1], sides[1], -1, sides[2]
    )
    order = cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten()
    frequency = [torch.arange(side, dtype=torch.float64) / side for side in sides]
    squared = sum(axis.square() for axis in torch.meshgrid(*frequency, indexing="ij"))
    assert isinstance(squared, torch.Tensor)
    # the slack keeps a frequency that stands on an edge from falling below it by a rounding
    ring = (squared.sqrt() * _RINGS + 1e-9).long().flatten()
    used, ring = ring.unique(return_inverse=True)
    band = torch.cat([ring + colour * len(used) for colour in range(colours)])

    mixing = torch.tensor(_OPPONENT, dtype=torch.float64) if colours > 1 else torch.ones(1, 1, dtype=torch.float64)
    mixing = mixing / mixing.norm(dim=1, keepdim=True)
    groups = channels // colours if channels // colours <= _APART else 1
    return _patches(mixing, torch.kron(cosines(sides[0]), cosines(sides[1])), cosines(sides[2]), order, band, groups, device)


def _patches(
    mixing: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    order: torch.Tensor,
    band: torch.Tensor,
    groups: int,
    device: torch.device,
) -> Patches:
    member = torch.nn.functional.one_hot(band).float()
    in_order = bool((order == torch.arange(len(order))).all())
    return Patches(
        mixing.float().to(device),
        rows.float().to(device),
        columns.float().to(device),
        torch.kron(mixing, rows).float().to(device),
        order.to(device),
        in_order,
        band.to(device),
        member.to(device),
        member.mean(0).to(device),
        groups,
    )


def each_number(sample_shape: tuple[int, ...], device: torch.device) -> Patches:
    """Every number a band."""
    numel = math.prod(sample_shape)
    columns = _divisor(numel, MAX_COLUMNS)
    rows = _divisor(numel // columns, MAX_ROWS)
    order, band = torch.arange(numel), torch.arange(rows * columns)
    groups = numel // (rows * columns)
    return _patches(torch.ones(1, 1), torch.eye(rows), torch.eye(columns), order, band, groups, device)


def _sides(frames: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Of a patch: the largest that divide the axes; its frames and rows are at most ``MAX_ROWS`` together."""
    side = _divisor(frames, 8)
    return side, _divisor(rows, MAX_ROWS // side), _divisor(columns, MAX_COLUMNS)


def _divisor(size: int, most: int) -> int:
    """The largest divisor that is not above ``most``."""
    return next(side for side in range(min(size, most), 0, -1) if size % side == 0)


def cosines(size: int) -> torch.Tensor:
    """The orthonormal DCT-II as a matrix, float64 [size, size]."""
    frequency = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * frequency[:, None] * (frequency + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
