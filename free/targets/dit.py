"""diffusers' class-conditional Diffusion Transformer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from free.checks import check_labels
from free.targets.base import Target, TargetOutput, check_output
from free.targets.hooks import is_as_written, leaves_the_host_out

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel, SchedulerMixin

    from free.processes import ReverseProcess


class DiTTarget(Target):
    """A ``DiTTransformer2DModel``: guidance of all latent channels in the same forward; learned-variance channels take no
    part in a step.

    Without labels every sample is drawn from the null class, ``config.num_embeds_ada_norm``.
    """

    def __init__(
        self,
        model: DiTTransformer2DModel,
        *,
        scheduler: SchedulerMixin | None = None,
        max_forward_batch: int | None = None,
    ) -> None:
        super().__init__(model, max_forward_batch)
        self.transformer = cast(Any, self.module)
        config = self.transformer.config
        self.channels = config.in_channels
        self.of_latents = self.channels not in (1, 3)
        self.null_class: int = config.num_embeds_ada_norm
        self.sample_shape = (self.channels, config.sample_size, config.sample_size)
        self.feature_shape = (
            (config.sample_size // config.patch_size) ** 2,
            config.num_attention_heads * config.attention_head_dim,
        )
        out_channels = config.out_channels or self.channels
        if out_channels not in (self.channels, 2 * self.channels):
            raise ValueError(
                f"model has {self.channels} input and {out_channels} output channels; allowed are as many outputs, or "
                "twice as many (learned variance)"
            )
        self.learns_variance = out_channels > self.channels
        self.scheduler = scheduler
        self._captured: list[torch.Tensor] = []
        self._capturing = False

    def check_ready(self) -> None:
        super().check_ready()
        self._as_written = self.module is not None and self.model is self.module and is_as_written(self.module)

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        """diffusers' DiT is, unless it is offloaded, or compiled into graphs of its own."""
        return leaves_the_host_out(self.model)

    @property
    def needs_copies(self) -> bool:
        """diffusers' DiT neither writes into its input nor uses its output's memory again; what was put around or into it,
        or compiled with options of the caller's, may."""
        return not self._as_written or bool(self._compile_options)

    def default_process(self, num_inference_steps: int) -> ReverseProcess:
        """A pipeline's scheduler decides; the transformer alone is sampled as the original DiT was."""
        if self.scheduler is None:
            return super().default_process(num_inference_steps)
        from free.processes import ReverseProcess

        return ReverseProcess.from_scheduler(self.scheduler, num_inference_steps)

    def check_conditioning(
        self, class_labels: Any, conditioning: dict[str, Any] | None, guidance_scale: float, batch: int | None
    ) -> tuple[dict[str, Any], int | None]:
        if conditioning:
            raise ValueError(f"conditioning has {sorted(conditioning)}; a DiT takes class_labels only")
        if class_labels is None:
            if guidance_scale != 1.0:
                raise ValueError(
                    f"guidance_scale is {guidance_scale} without class_labels; give labels, or guidance_scale=1"
                )
            return {"class_labels": torch.full((batch or 1,), self.null_class, device="cpu")}, batch
        labels = check_labels(class_labels)
        if labels.dim() == 0:
            labels = labels.expand(batch or 1)
        if ((labels < 0) | (labels >= self.null_class)).any():
            wrong = labels[(labels < 0) | (labels >= self.null_class)][0].item()
            raise ValueError(f"class_labels holds {wrong}; allowed are 0 … {self.null_class - 1} (None is the null class)")
        return {"class_labels": labels}, len(labels)

    def forward(
        self, states: torch.Tensor, timestep: torch.Tensor, conditioning: dict[str, Any], guided: bool
    ) -> TargetOutput:
        labels = conditioning["class_labels"]
        rows = len(states)
        inputs = states.to(self._input_dtype)
        if guided:
            inputs = torch.cat((inputs, inputs))
            timestep = torch.cat((timestep, timestep))
            labels = torch.cat((labels, torch.full_like(labels, self.null_class)))
        self._captured.clear()
        raw = self.model(inputs, timestep=timestep, class_labels=labels, return_dict=False)[0]
        output = check_output(raw[:, : self.channels], inputs)
        feature = None
        if self._capturing:
            if len(self._captured) != 1:
                raise RuntimeError(
                    f"the model's top block ran {len(self._captured)} times within one forward: somebody else calls the "
                    "model while it is sampled from; wait for the sampler, or give it a copy of the model"
                )
            feature = self._captured.pop()[:rows]
        share = None
        if self._capturing_variance:
            # the network gives -1 for the posterior's log variance and 1 for beta's
            share = ((raw[:rows, self.channels :].float() + 1) / 2).clamp(0, 1).flatten(1).mean(-1)
        return TargetOutput(output[:rows], output[rows:] if guided else None, feature, share)

    def _compiled_parts(self) -> Sequence[torch.nn.Module]:
        # whole, it would not see the hook of the top block's feature
        return list(self.transformer.transformer_blocks)

    @contextmanager
    def capture_features(self) -> Iterator[None]:
        if self._capturing:  # a run from within another's callback
            yield
            return
        captured = self._captured

        def keep(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            captured.append(output)

        handle = self.transformer.transformer_blocks[-1].register_forward_hook(keep)
        self._capturing = True
        try:
            yield
        finally:
            handle.remove()
            self._capturing = False
            captured.clear()

    def label_embedding(self, conditioning: dict[str, Any]) -> torch.Tensor:
        """Of the first block: every block has a copy of the embedder."""
        return self.transformer.transformer_blocks[0].norm1.emb.class_embedder(conditioning["class_labels"])
