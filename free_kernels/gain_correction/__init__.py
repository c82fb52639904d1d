"""What learned gains add to held drafts."""

from __future__ import annotations

import torch

from free_kernels.checks import check_index, check_values
from free_kernels.dispatch import resolve
from free_kernels.gain_correction import reference
from free_kernels.gains import Scales, check_scales
from free_kernels.patches import Patches, check_patches
from free_kernels.table import StepTable, check_table

__all__ = ["gain_correction"]


def gain_correction(
    path: torch.Tensor,
    step: torch.Tensor,
    known_states: torch.Tensor,
    known_x0: torch.Tensor,
    known_sums: torch.Tensor,
    known_step: torch.Tensor,
    known_length: torch.Tensor,
    table: StepTable,
    scales: Scales,
    patches: Patches,
    *,
    ridge: float,
    impl: str = "auto",
) -> torch.Tensor:
    """What makes a hold-x0 draft answer to its state: ``correction`` of :func:`free_kernels.propose`.

    A draft of step k holds the x0 of its anchor, the last window's evaluation at step a, and adds g * d: d is the innovation
    of its state (:func:`free_kernels.learn_gains`), g in each band ``answered / (answered + r(k) * unanswered)`` of the sums
    as of the anchor's column, those of two states of one step where a = k and those of neighbours where a < k. Carrying
    the second sum by r and not by r² shrinks a gain more slowly from step to step than the Wiener filter's; it measured
    better. Gains are 0 to 1.1, and 0 while nothing is known. The drafts of one window follow the path that the earlier
    corrections lead to, exactly where x0 is not clipped.

    Args:
        path: the window as hold-x0 drafts it [B, W, D], float, of a process of second order with what it remembers
            (``previous_x0`` of :func:`free_kernels.propose`); its last column is not read.
        step: int64 [B], of its first state.
        known_states, known_x0, known_sums, known_step, known_length: what the last window taught, as
            :func:`free_kernels.learn_gains` says; its columns are the anchors of :func:`free_kernels.propose`.
        table: the process, columns [S].
        scales: of its steps.
        patches: how samples of D numbers are cut.
        ridge: weight of the sums of all bands, each band by its share of the frequencies, in each band's own, 0 or more.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        [B, W-1, D], float32 (float64 if ``path`` is). Column j knows the path up to column j.

    Raises:
        ValueError: an argument of a wrong shape, dtype, device or value, named.
    """
    device = path.device
    check_values("path", path, (None, None, None), device)
    batch, window, numel = path.shape
    if window < 2:
        raise ValueError(f"path has {window} column; a window of 1 drafts nothing, allowed are 2 or more")
    check_values("known_states", known_states, (batch, None, numel), device)
    check_values("known_x0", known_x0, known_states.shape, device)
    check_patches(patches, numel, device)
    check_values("known_sums", known_sums, (batch, known_states.shape[1], 2, 2, patches.bands), device)
    for name, index in (("step", step), ("known_step", known_step), ("known_length", known_length)):
        check_index(name, index, (batch,), device)
    check_table(table, device)
    check_scales(scales, table.num_steps, device)
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}; allowed is 0 or more")
    arguments = (path, step, known_states, known_x0, known_sums, known_step, known_length, table, scales, patches, ridge)
    chosen = resolve(impl, device, path=path, known_states=known_states, known_x0=known_x0, known_sums=known_sums)
    if chosen == "triton":
        from free_kernels.gain_correction import kernel

        return kernel.gain_correction(*arguments)
    return reference.gain_correction(*arguments)
