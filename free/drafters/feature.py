"""The learned drafter: one DiT-size block that leans on the target's top-block feature.

FREE (arXiv 2511.20390) drafts with a block that fuses the embedded state with the last top-block feature, and predicts the
network output and the next feature (``base=None``). With a base, which is ours, the block predicts what the base's draft
misses (``"gains"`` or ``"hold-x0"``), is told how the anchor looked, and uses it as a control variate where it stands at the
same step. Either drafts one step after the other, or in sweeps: propose the path, run the block once on all states of the
window, propose again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, get_timestep_embedding
from diffusers.models.normalization import AdaLayerNormZero
from safetensors import SafetensorError

from free.drafters.base import Anchor, Drafter, LastWindow, Situation, walk
from free.drafters.gains import GainMemory, Gains
from free.drafters.hold import hold
from free_kernels import Proposal

if TYPE_CHECKING:
    from free.processes import ReverseProcess
    from free.targets import Target

Base = Literal["gains", "hold-x0"] | None
BASES = ("gains", "hold-x0", None)
_FREQUENCIES = 256
_CONFIG_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

Block = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass
class Inputs:
    """What the block sees of N states, an argument of :meth:`FeatureDrafter.forward` each."""

    images: torch.Tensor
    """float32 [N, images * channels, height, width]."""
    timestep: torch.Tensor
    """[N]."""
    gap: torch.Tensor
    """[N], how many timesteps ago the anchor was evaluated."""


class FeatureDrafter(ModelMixin, ConfigMixin, Drafter):
    """One adaLN-Zero block (Peebles & Xie 2023) of the target's width, about 32 M parameters for a DiT-XL/2.

    The label's embedding is the target's own. Fresh from :meth:`from_target` the output head is zero: with a base it drafts
    as the base does until it is trained.

    Args:
        num_attention_heads, attention_head_dim: of the target; their product is the width.
        in_channels, sample_size, patch_size: of the target.
        base: what the block's output is added to: ``"gains"`` or ``"hold-x0"``, the drafters of these names; None predicts
            the output itself (the paper's drafter).
        sweeps: 0 drafts one step after the other, n > 0 in n sweeps; None is 0 for ``base=None``, else 1. The attribute
            ``sweeps`` may be changed at any time.

    Raises:
        ValueError: an unknown base or negative sweeps.
    """

    name = "feature"
    needs_features = True
    capturable = True

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        in_channels: int,
        sample_size: int,
        patch_size: int,
        base: Base = "gains",
        sweeps: int | None = None,
    ) -> None:
        super().__init__()
        if base not in BASES:
            raise ValueError(f"base is {base!r}; allowed are {', '.join(map(repr, BASES))}")
        if sweeps is None:
            sweeps = 0 if base is None else 1
        if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 0:
            raise ValueError(f"sweeps is {sweeps!r}; allowed is an int, 0 (one step after the other) or more, or None")
        width = num_attention_heads * attention_head_dim
        self.base, self.sweeps, self.width = base, sweeps, width
        self._gains = Gains() if base == "gains" else None
        self.tokens = (sample_size // patch_size) ** 2
        # with a base the block also sees the anchor's output, the base's draft, the anchor's x0, and how far the state moved
        images = 1 if base is None else 5
        self.embed = PatchEmbed(sample_size, sample_size, patch_size, images * in_channels, width)
        self.embed_time = TimestepEmbedding(2 * _FREQUENCIES, width)
        self.norm_feature = torch.nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.fuse = torch.nn.Linear(2 * width, width)
        self.norm1 = AdaLayerNormZero(width)
        self.attention = Attention(width, heads=num_attention_heads, dim_head=attention_head_dim, bias=True)
        self.norm2 = torch.nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.feed_forward = FeedForward(width, activation_fn="gelu-approximate")
        # with a base every draft leans on a feature of the target's
        self.to_feature = torch.nn.Linear(width, width) if base is None else None
        self.norm_out = torch.nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulate_out = torch.nn.Linear(width, 2 * width)
        self.to_output = torch.nn.Linear(width, patch_size**2 * in_channels)
        for layer in (self.norm1.linear, self.to_feature, self.modulate_out, self.to_output):
            if layer is not None:
                torch.nn.init.zeros_(layer.weight)
                torch.nn.init.zeros_(layer.bias)

    @classmethod
    def from_target(cls, model: Any, *, base: Base = "gains", sweeps: int | None = None) -> FeatureDrafter:
        """An untrained drafter that fits a DiT, on its device and in its dtype.

        Args:
            model: a ``DiTTransformer2DModel``, a ``DiTPipeline`` or their :class:`free.Target`.
            base, sweeps: see the class.

        Raises:
            ValueError: a model without a top-block feature.
        """
        from free.targets import as_target

        target = as_target(model)
        target.check_features()
        config = cast(Any, target.module).config
        # by name: diffusers takes what is given by position for a default
        drafter = cls(
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            in_channels=config.in_channels,
            sample_size=config.sample_size,
            patch_size=config.patch_size,
            base=base,
            sweeps=sweeps,
        )
        # diffusers' own `to` warns of every change of dtype
        return torch.nn.Module.to(drafter, target.device, target.dtype).eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load what ``save_pretrained`` wrote, as diffusers' models are (its keywords are the same); safetensors only.

        Raises:
            ValueError: not a FeatureDrafter, or weights that are missing, corrupt, truncated or of other shapes.
        """
        where = f"drafter {str(pretrained_model_name_or_path)!r}"
        with_report = kwargs.pop("output_loading_info", False)
        of_config = {name: kwargs[name] for name in _CONFIG_KEYWORDS if name in kwargs}
        try:
            name = cls.load_config(pretrained_model_name_or_path, **of_config).get("_class_name")
            if name != cls.__name__:
                raise ValueError(f"it is a {name}; allowed is a {cls.__name__}")
            drafter, report = super().from_pretrained(
                pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True, "output_loading_info": True}
            )
        except (OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"{where} cannot be loaded: {error}") from error
        # diffusers fills what is missing with random numbers
        for what in ("missing", "unexpected"):
            if report[f"{what}_keys"]:
                names = sorted(report[f"{what}_keys"])
                raise ValueError(f"{where} has {len(names)} {what} weights, {names[0]!r} for one")
        return (drafter, report) if with_report else drafter

    def check(self, target: Target) -> None:
        feature_shape = target.check_features()
        shape = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        for what, own, others in (
            ("top-block features of (tokens, width)", (self.tokens, self.width), feature_shape),
            ("samples of shape", shape, target.sample_shape),
            ("the device", self.device, target.device or self.device),
        ):
            if own != others:
                raise ValueError(f"drafter was made for {what} {own}; the target's are {others}")

    def forward(
        self,
        images: torch.Tensor,
        timestep: torch.Tensor,
        gap: torch.Tensor,
        label_embedding: torch.Tensor,
        feature: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The block on N states.

        Args:
            images: [N, images * channels, height, width]: the state, with a base also the anchor's output, the base's draft,
                the anchor's x0 and the state's way from the anchor, all of order one.
            timestep: [N].
            gap: [N], the anchor's timestep less this one.
            label_embedding: [N, width], the target's.
            feature: [N, tokens, width], the top-block feature of an earlier step.

        Returns:
            Output [N, channels, height, width], or what the base's draft misses of it; and the feature [N, tokens, width]
            at this step, None with a base.
        """
        channels, size, patch = self.config.in_channels, self.config.sample_size, self.config.patch_size
        images, label_embedding, feature = (values.to(self.dtype) for values in (images, label_embedding, feature))
        times = [
            get_timestep_embedding(t.flatten(), _FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=1)
            for t in (timestep, gap)
        ]
        condition = self.embed_time(torch.cat(times, -1).to(self.dtype)) + label_embedding  # [N, width]

        hidden = self.fuse(torch.cat((self.embed(images), self.norm_feature(feature)), -1))  # [N, tokens, width]
        normed, attention_gate, shift, scale, gate = self.norm1(hidden, emb=condition)
        hidden = hidden + attention_gate[:, None] * self.attention(normed)
        normed = self.norm2(hidden) * (1 + scale[:, None]) + shift[:, None]
        hidden = hidden + gate[:, None] * self.feed_forward(normed)

        shift, scale = self.modulate_out(torch.nn.functional.silu(condition)).chunk(2, -1)
        patches = self.to_output(self.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])  # [N, tokens, p * p * C]
        side = size // patch
        patches = patches.view(-1, side, side, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)  # [N, C, side, p, side, p]
        next_feature = None if self.to_feature is None else feature + self.to_feature(hidden)
        return patches.reshape(-1, channels, size, size), next_feature

    def predict(
        self,
        state: torch.Tensor,
        step: torch.Tensor,
        anchor: Anchor,
        label_embedding: torch.Tensor,
        process: ReverseProcess,
        feature: torch.Tensor | None = None,
        block: Block | None = None,
        answer: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The block's word on N states, the control variate included.

        Args:
            state: float32 [N, D].
            step: int64 [N].
            anchor: with fields [N, ...].
            label_embedding: [N, width].
            process: of the steps.
            feature: [N, tokens, width], of an earlier step; the anchor's if left out.
            block: runs the block; this module itself if left out (training passes its wrapped form).
            answer: [N, D], what the gains add to hold-x0's draft, where they are the base.

        Returns:
            The output, or with a base what its draft misses of it, float32 [N, D]; and the next feature.
        """
        feature = anchor.feature if feature is None else feature
        assert feature is not None  # the sampler captures it for a drafter that needs it
        if self.base is None:
            seen = self.inputs(state, step, anchor, process)
            output, next_feature = (block or self)(seen.images, seen.timestep, seen.gap, label_embedding, feature)
            return output.flatten(1).float(), next_feature
        # at the anchor's own state the draft is what the target said there: what the block adds to it there is its error
        same = anchor.step == step
        rows = _rows(same)
        both = torch.cat((torch.arange(len(state), device=state.device), rows))
        if answer is not None:  # to no way from the anchor gains have none
            answer = torch.cat((answer, torch.zeros_like(anchor.state[rows])))
        seen = self.inputs(
            torch.cat((state, anchor.state[rows])), torch.cat((step, anchor.step[rows])), anchor.take(both), process, answer
        )
        output, _ = (block or self)(seen.images, seen.timestep, seen.gap, label_embedding[both], feature[both])
        output, error = output.flatten(1).float().split((len(state), len(rows)))
        return output.index_add(0, rows, torch.where(same[rows, None], -error, 0.0)), None

    def inputs(
        self,
        state: torch.Tensor,
        step: torch.Tensor,
        anchor: Anchor,
        process: ReverseProcess,
        answer: torch.Tensor | None = None,
    ) -> Inputs:
        """What :meth:`forward` sees of states float32 [N, D] at steps int64 [N], anchored at N evaluations; the rest as in
        :meth:`predict`.
        """
        timestep = process.timestep[step]
        gap = process.timestep[anchor.step] - timestep
        images = [state]
        if self.base is not None:
            # an x0 estimate is as large as the noise it divides by; the way moved grows with the root of the steps
            x0_scale = torch.hypot(process.x0_state_coef, process.x0_model_coef)[anchor.step][:, None]
            std = process.std[step][:, None]
            reach = std * (1 + step - anchor.step)[:, None].sqrt()
            moved = torch.where(std > 0, (state - anchor.state) / reach, 0.0)
            draft = anchor.hold_x0(state, step, process)
            if answer is not None:
                draft = draft + answer
            images += [anchor.output, draft, anchor.x0(process) / x0_scale, moved]
        size = self.config.sample_size
        return Inputs(torch.stack(images, 1).view(len(state), -1, size, size), timestep, gap)

    @contextmanager
    def running(self, *, compile: bool = False, **options: Any) -> Iterator[None]:
        if compile:  # with what makes the block's inputs, which launches more than the block does
            self.predict = torch.compile(self.predict, fullgraph=True, **options)  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.__dict__.pop("predict", None)

    def begin(self, last: LastWindow, sample_shape: tuple[int, ...]) -> GainMemory | None:
        return None if self._gains is None else self._gains.begin(last, sample_shape)

    def remember(self, situation: Situation, window: LastWindow) -> GainMemory | None:
        return None if self._gains is None else self._gains.remember(situation, window)

    def propose(self, situation: Situation) -> Proposal:
        if situation.window == 1:
            return hold(situation, "hold-x0")
        label_embedding = situation.target.label_embedding(situation.conditioning)  # [B, width]
        return (self._sweep if self.sweeps else self._walk)(situation, label_embedding)

    def _walk(self, situation: Situation, label_embedding: torch.Tensor) -> Proposal:
        """One step after the other."""
        process = situation.process
        feature = None

        def draft(state: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
            nonlocal feature
            if self.base is not None:
                anchor, answer = situation.anchor(step), self.answer(situation, state, step)
                missing, _ = self.predict(state, step, anchor, label_embedding, process, answer=answer)
                held = anchor.hold_x0(state, step, process)
                return held + missing if answer is None else held + answer + missing
            # the target's feature of the last settled step, then the block's own
            before = situation.anchor((step - 1).clamp(min=0))
            previous = replace(before, step=(step - 1).clamp(min=0))
            feature = before.feature if feature is None else feature
            output, feature = self.predict(state, step, previous, label_embedding, process, feature)
            return output

        return walk(situation, draft)

    def _sweep(self, situation: Situation, label_embedding: torch.Tensor) -> Proposal:
        """The whole path at once: what the block adds to the base's drafts on one path corrects them on the next."""
        process, drafts = situation.process, situation.window - 1
        steps = situation.step[:, None] + torch.arange(drafts, device=situation.step.device)
        steps = steps.clamp_(max=process.num_steps - 1)  # [B, W-1]
        anchor = situation.anchor(steps).flatten()
        label_embedding = label_embedding.repeat_interleave(drafts, 0)  # [B * (W-1), width]
        proposal, answer = self.hold(situation)
        for _ in range(self.sweeps):
            state, step = proposal.states[:, :-1].flatten(0, 1), steps.flatten()
            answer = None if answer is None else answer.flatten(0, 1)
            correction, _ = self.predict(state, step, anchor, label_embedding, process, answer=answer)
            if self.base is None:
                correction = correction - anchor.hold_x0(state, step, process)
            proposal, answer = self.hold(situation, correction.unflatten(0, steps.shape))
        return proposal

    def hold(self, situation: Situation, correction: torch.Tensor | None = None) -> tuple[Proposal, torch.Tensor | None]:
        """The base's window, ``correction`` [B, W-1, D] added to its drafts; and what gains add to hold-x0's, where they are
        the base.
        """
        if self._gains is None:
            return hold(situation, "hold-x0", correction, effective=correction is None), None
        return self._gains.propose_with(situation, correction)

    def answer(self, situation: Situation, state: torch.Tensor, step: torch.Tensor) -> torch.Tensor | None:
        """What gains add to hold-x0's draft at ``state`` [B, D] of ``step`` int64 [B], [B, D], where they are the base."""
        return None if self._gains is None else self._gains.answer(situation, state, step)


def _rows(chosen: torch.Tensor) -> torch.Tensor:
    """Where ``chosen`` bool [N] is true; all rows where their number must not be asked for: on a device, or compiled."""
    if chosen.device.type == "cpu" and not torch.compiler.is_compiling():
        return chosen.nonzero()[:, 0]
    return torch.arange(len(chosen), device=chosen.device)
