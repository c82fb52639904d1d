"""What adapts a model to the sampler: one file a family, and the plain callable."""

from __future__ import annotations

from typing import Any

from free.targets.base import Target, TargetOutput
from free.targets.dit import DiTTarget
from free.targets.function import CallableTarget
from free.targets.known import KnownEntries

__all__ = ["CallableTarget", "DiTTarget", "KnownEntries", "Target", "TargetOutput", "as_target"]


def as_target(
    model: Any,
    *,
    max_forward_batch: int | None = None,
    null_conditioning: dict[str, Any] | None = None,
) -> Target:
    """The target that a model stands for.

    Args:
        model: a diffusers ``DiTTransformer2DModel`` or ``DiTPipeline`` (a ``torch.compile``d transformer too), any callable
            ``model(x, timestep, **conditioning) -> output`` with x [N, ...] and timestep [N], or a target already.
        max_forward_batch: most states in one forward (both guidance halves counted), to bound memory; None is all at once.
        null_conditioning: what a callable's conditioning becomes in the unconditional half of guidance: the same names,
            tensors without a batch axis or with one of size 1.

    Returns:
        A :class:`free.targets.Target`.

    Raises:
        ValueError: a model in train mode or with a cache hook, or an argument that the model has no use for.
        TypeError: something that cannot be called.
    """
    from diffusers import DiffusionPipeline, DiTPipeline, DiTTransformer2DModel

    if isinstance(model, Target):
        if max_forward_batch is not None or null_conditioning is not None:
            raise ValueError("model is a target already; give max_forward_batch and null_conditioning where it was made")
        return model
    if isinstance(model, DiTPipeline):
        transformer, scheduler = model.transformer, model.scheduler
    else:
        transformer, scheduler = model, None
    if not isinstance(transformer, DiTTransformer2DModel) and hasattr(transformer, "get_base_model"):
        # a PEFT model's base has the adapters in its layers, and is the DiT that the sampler knows
        base = transformer.get_base_model()
        transformer = base if isinstance(base, DiTTransformer2DModel) else transformer
    if isinstance(getattr(transformer, "_orig_mod", transformer), DiTTransformer2DModel):
        if null_conditioning is not None:
            raise ValueError("null_conditioning was given for a DiT, which has a null class of its own; leave it out")
        return DiTTarget(transformer, scheduler=scheduler, max_forward_batch=max_forward_batch)
    if isinstance(model, DiffusionPipeline) or not callable(model):
        raise TypeError(
            f"model is a {type(model).__name__}; allowed are a DiTTransformer2DModel, a DiTPipeline, "
            "or a callable model(x, timestep, **conditioning) -> output"
        )
    return CallableTarget(model, max_forward_batch=max_forward_batch, null_conditioning=null_conditioning)
