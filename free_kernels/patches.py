"""Samples as patches, and the frequencies of a patch in bands: what the operations that learn gains work in."""

from __future__ import annotations

from typing import NamedTuple

import torch

from free_kernels.checks import check_index, check_values

MAX_ROWS, MAX_COLUMNS = 64, 32


class Patches(NamedTuple):
    """How a sample of D = G * N * P * Q numbers is cut: G groups of N patches of P * Q numbers, each P by Q.

    ``frequencies = rows @ patch @ columns.T``, both matrices orthonormal. Each group has K bands of its own, a band being
    some of the frequencies of all the group's patches.
    """

    rows: torch.Tensor
    """float [P, P]; P is at most :data:`MAX_ROWS`."""
    columns: torch.Tensor
    """float [Q, Q]; Q is at most :data:`MAX_COLUMNS`."""
    order: torch.Tensor
    """int64 [D]: where in the sample each number of the patches is."""
    in_order: bool
    """Whether ``order`` is 0 … D - 1."""
    band: torch.Tensor
    """int64 [P * Q]: the band of each frequency of a patch, 0 … K - 1."""
    member: torch.Tensor
    """float [P * Q, K]: one where a frequency is of a band, else zero."""
    groups: int
    """G."""

    @property
    def bands(self) -> int:
        """G * K."""
        return self.groups * self.member.shape[1]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Frequencies [..., D], patch after patch, of samples [..., D]."""
        flat = values.reshape(-1, values.shape[-1])  # an index is fast on matrices only
        if not self.in_order:
            flat = flat.index_select(1, self.order)
        patches = flat.unflatten(-1, (-1, len(self.rows), len(self.columns)))
        return (self.rows.to(values.dtype) @ patches @ self.columns.to(values.dtype).T).view(values.shape)

    def inverse(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Samples [..., D] of frequencies [..., D]."""
        patches = frequencies.reshape(-1, frequencies.shape[-1]).unflatten(-1, (-1, len(self.rows), len(self.columns)))
        flat = (self.rows.to(patches.dtype).T @ patches @ self.columns.to(patches.dtype)).flatten(1)
        if not self.in_order:
            flat = torch.empty_like(flat).index_copy_(1, self.order, flat)
        return flat.view(frequencies.shape)

    def sums(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Sums over each band, [..., G * K], of frequencies [..., D]."""
        of_group = frequencies.unflatten(-1, (self.groups, -1, len(self.band))).sum(-2)  # [..., G, P * Q]
        return (of_group @ self.member.to(of_group.dtype)).flatten(-2)

    def spread(self, values: torch.Tensor, numel: int) -> torch.Tensor:
        """Each band's value [..., G * K] at its frequencies, [..., D]."""
        of_patch = values.reshape(-1, self.member.shape[1]).index_select(1, self.band)  # [... * G, P * Q]
        count = numel // (self.groups * len(self.band))
        return of_patch.unsqueeze(1).expand(-1, count, -1).reshape(*values.shape[:-1], numel)


def check_patches(patches: Patches, numel: int, device: torch.device) -> None:
    """Matrices, bands and order that fit each other and samples of ``numel`` numbers on ``device``."""
    rows, columns = patches.rows.shape[0], patches.columns.shape[0]
    if rows > MAX_ROWS or columns > MAX_COLUMNS:
        raise ValueError(f"patches are {rows} by {columns}; at most {MAX_ROWS} by {MAX_COLUMNS} are allowed")
    if patches.groups < 1 or numel % (patches.groups * rows * columns):
        raise ValueError(f"patches {rows} by {columns} in {patches.groups} groups do not divide samples of {numel} numbers")
    check_values("patches.rows", patches.rows, (rows, rows), device)
    check_values("patches.columns", patches.columns, (columns, columns), device)
    check_values("patches.member", patches.member, (rows * columns, None), device)
    check_index("patches.band", patches.band, (rows * columns,), device)
    check_index("patches.order", patches.order, (numel,), device)
