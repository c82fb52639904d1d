"""Samples as patches, and the frequencies of a patch in bands: what the operations that learn gains work in."""

from __future__ import annotations

from typing import NamedTuple

import torch

from free_kernels.checks import check_index, check_values

MAX_ROWS, MAX_COLUMNS = 32, 32


class Patches(NamedTuple):
    """How a sample of D = G * N * M * P * Q numbers is cut: G groups of N patches, each of M channels, P by Q.

    The frequencies of a patch are ``rows @ mixed @ columns.T`` of its channels mixed with one another, all three matrices
    orthonormal. Each group has K bands of its own, a band being some of the frequencies of all the group's patches.
    """

    mixing: torch.Tensor
    """float [M, M]; of a lone channel it is one."""
    rows: torch.Tensor
    """float [P, P]; P is at most :data:`MAX_ROWS`."""
    columns: torch.Tensor
    """float [Q, Q]; Q is at most :data:`MAX_COLUMNS`."""
    mixed_rows: torch.Tensor
    """float [M * P, M * P]: mixing and rows as one matrix, their Kronecker product."""
    order: torch.Tensor
    """int64 [D]: where in the sample each number of the patches is."""
    in_order: bool
    """Whether ``order`` is 0 … D - 1."""
    band: torch.Tensor
    """int64 [M * P * Q]: the band of each frequency of a patch, 0 … K - 1."""
    member: torch.Tensor
    """float [M * P * Q, K]: one where a frequency is of a band, else zero."""
    share: torch.Tensor
    """float [K]: the part of a patch's frequencies that each band has."""
    groups: int
    """G."""

    @property
    def bands(self) -> int:
        """G * K."""
        return self.groups * len(self.share)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Frequencies [..., D], patch after patch, of samples [..., D]."""
        flat = values.reshape(-1, values.shape[-1])  # an index is fast on matrices only
        if not self.in_order:
            flat = flat.index_select(1, self.order)
        patches = flat.unflatten(-1, (-1, len(self.mixed_rows), len(self.columns)))
        return (self.mixed_rows.to(values.dtype) @ patches @ self.columns.to(values.dtype).T).view(values.shape)

    def inverse(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Samples [..., D] of frequencies [..., D]."""
        dtype, numel = frequencies.dtype, frequencies.shape[-1]
        patches = frequencies.reshape(-1, numel).unflatten(-1, (-1, len(self.mixed_rows), len(self.columns)))
        flat = (self.mixed_rows.to(dtype).T @ patches @ self.columns.to(dtype)).flatten(1)
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
    channels, rows, columns = (len(matrix) for matrix in patches[:3])
    if rows > MAX_ROWS or columns > MAX_COLUMNS:
        raise ValueError(f"patches are {rows} by {columns}; at most {MAX_ROWS} by {MAX_COLUMNS} are allowed")
    size = channels * rows * columns
    if patches.groups < 1 or numel % (patches.groups * size):
        raise ValueError(
            f"patches of {channels} channels, {rows} by {columns}, in {patches.groups} groups do not divide samples of "
            f"{numel} numbers"
        )
    for name, side in (("mixing", channels), ("rows", rows), ("columns", columns), ("mixed_rows", channels * rows)):
        check_values(f"patches.{name}", getattr(patches, name), (side, side), device)
    check_values("patches.share", patches.share, (None,), device)
    check_values("patches.member", patches.member, (size, len(patches.share)), device)
    check_index("patches.band", patches.band, (size,), device)
    check_index("patches.order", patches.order, (numel,), device)
