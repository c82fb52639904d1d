"""What a drafter is trained to make small."""

from __future__ import annotations

from typing import Literal

import torch

from free.drafters.feature import Block, FeatureDrafter
from free.training.examples import Examples

LOSSES = ("mse", "log-delta", "rejection")
_LEAST = 1e-12  # of |delta|², whose root has no gradient at zero


def drafter_loss(
    drafter: FeatureDrafter,
    examples: Examples,
    *,
    kind: Literal["mse", "log-delta", "rejection"] = "log-delta",
    feature_weight: float = 0.5,
    smooth_weight: float = 0.005,
    block: Block | None = None,
) -> dict[str, torch.Tensor]:
    """``loss = noise + feature_weight * feature + smooth_weight * smooth`` of N examples.

    FREE (arXiv 2511.20390) trains on the squared errors of output (noise) and feature, and names a temporal smoothness of
    the features without defining it: here it is the squared difference of the predicted feature from the one before it.
    With a base no feature is predicted, and both terms are zero.

    Args:
        drafter: the module whose parameters learn.
        examples: what to learn.
        kind: of the noise term: ``"mse"``, the paper's; ``"log-delta"``, ours: log(1 + |delta|²) with the delta of the
            acceptance test; what is far off is rejected whatever becomes of it, and a step counts by its noise; or
            ``"rejection"``, the probability of a rejection, erf(|delta| / sqrt(8)) (FREE, eq. 40).
        feature_weight, smooth_weight: of the paper's other terms.
        block: runs the drafter's forward, where it is wrapped.

    Returns:
        Scalars ``loss``, ``noise``, ``feature``, ``smooth``, and ``delta``, the norms |delta| [N] without a gradient.
    """
    predicted, feature = drafter.predict(
        examples.state,
        examples.step,
        examples.anchor,
        examples.label_embedding,
        examples.process,
        examples.feature,
        block,
        examples.answer,
    )
    error = predicted - examples.wanted  # [N, D]
    scale = (examples.process.model_coef / examples.process.std)[examples.step]
    squared_norm = (scale[:, None] * error).square().sum(-1)  # |delta|², [N]
    if kind == "rejection":
        of_example = torch.erf((squared_norm + _LEAST).sqrt() / 8**0.5)
    else:
        of_example = squared_norm.log1p() if kind == "log-delta" else error.square().mean(-1)
    weight = examples.weight / examples.weight.sum()
    noise = (weight * of_example).sum()
    nothing = noise.new_zeros(())
    of_feature, smooth = nothing, nothing
    if feature is not None and examples.next_feature is not None and examples.feature is not None:
        of_feature = (weight * (feature - examples.next_feature).float().square().flatten(1).mean(-1)).sum()
        smooth = (weight * (feature - examples.feature).float().square().flatten(1).mean(-1)).sum()
    loss = noise + feature_weight * of_feature + smooth_weight * smooth
    return {"loss": loss, "noise": noise, "feature": of_feature, "smooth": smooth, "delta": squared_norm.detach().sqrt()}
