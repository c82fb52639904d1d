"""The interface between a model and the sampler, and the checks that every model passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from free.checks import check_count
from free.targets.hooks import execution_device, stateful_hook
from free.targets.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from free.processes import ReverseProcess


_RECOMPILE_LIMIT = 64
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Worst difference of a model's answers, over the largest answer, that a batch of another size explains, by dtype."""


@dataclass
class TargetOutput:
    """What one evaluation of N states yields, as the network gave it (dtype and all)."""

    output: torch.Tensor
    """[N, *sample shape]: conditional half where guidance is used."""
    unconditional: torch.Tensor | None = None
    """[N, *sample shape] under guidance, else None."""
    feature: torch.Tensor | None = None
    """Top-block feature [N, tokens, width] of the conditional half, while it is captured."""
    variance_share: torch.Tensor | None = None
    """float32 [N] in [0, 1], while it is captured: where the learned log variance lies between log posterior variance (0)
    and log beta (1), mean over the sample's elements; of the conditional half."""


def _knows_modes(module: torch.nn.Module) -> bool:
    """Whether train mode may change what a part of a model returns; an adapter (LoRA) leaves its parts in that mode."""
    if isinstance(module, (torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d)):
        return module.p > 0
    return not (type(module) in _MODELESS or type(module).__module__.startswith("peft."))


_MODELESS = (
    torch.nn.Identity,
    torch.nn.Linear,
    torch.nn.Embedding,
    torch.nn.Conv1d,
    torch.nn.Conv2d,
    torch.nn.Conv3d,
    torch.nn.ModuleDict,
    torch.nn.ModuleList,
    torch.nn.ParameterDict,
    torch.nn.ParameterList,
    torch.nn.Sequential,
)


class Target(ABC):
    """The exact model, ready to be evaluated at any states of any steps in one forward.

    A subclass says what one sample looks like, checks the caller's conditioning, and evaluates.
    """

    sample_shape: tuple[int, ...] | None = None
    """Shape of one sample, where the model knows it."""
    feature_shape: tuple[int, int] | None = None
    """(tokens, width) of the top-block feature; None where there is none to capture."""
    of_latents = False
    """Whether samples look like an autoencoder's latents, which have no bounds, and not like pixels."""
    learns_variance = False
    """Whether the model predicts the variance of each step beside its mean, which can be captured."""
    capturable = False
    """Whether a forward leaves the host out, so that it may be recorded as a CUDA graph: no read from the device, no random
    state, nothing that differs from call to call.
    """
    ranks: Ranks = ALONE
    """The processes that evaluate it together."""

    def __init__(self, model: Any, max_forward_batch: int | None = None) -> None:
        if max_forward_batch is not None:
            max_forward_batch = check_count("max_forward_batch", max_forward_batch)
        module = getattr(model, "_orig_mod", model)
        self.model = model
        self.module = module if isinstance(module, torch.nn.Module) else None
        self.max_forward_batch = max_forward_batch
        self.compiled = False
        """Whether it is run within :meth:`compile`."""
        self._compile_options: dict[str, Any] = {}
        self.runs = 0
        """How many runs of it are under way: more than one where a callback samples the model that calls it."""
        self._capturing_variance = False
        self.check_ready()

    def check_ready(self) -> None:
        """Refuse a model whose output is not a function of its input. Called again before each run.

        Raises:
            ValueError: train mode (dropout, dropped labels) or a stateful hook such as a cache.
        """
        self._input_dtype = self.dtype  # all parameters are looked at: not in each forward
        if self.module is None:
            return
        if self.module.training or any(module.training and _knows_modes(module) for module in self.module.modules()):
            raise ValueError("model is in train mode, where labels and activations are dropped at random; call model.eval()")
        hook = stateful_hook(self.module)
        if hook is not None:
            raise ValueError(
                f"model has a cache hook ({hook}): its output depends on earlier calls, so it is no longer the model that "
                "was asked for; call model.disable_cache() or remove the hook"
            )

    @property
    def device(self) -> torch.device | None:
        """Where the model computes, which is where its parameters are unless it is offloaded; None if it has none."""
        parameter = self._parameter()
        if parameter is None or self.module is None:
            return None
        return execution_device(self.module) or parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model takes as input: the dtype that it says it has, as diffusers' models do, which keep some parameters
        in another; else that of most of its floating parameters; float32 if there are none.
        """
        said = getattr(self.module, "dtype", None)
        if isinstance(said, torch.dtype) and said.is_floating_point and self._parameter() is not None:
            return said
        numbers: Counter[torch.dtype] = Counter()
        for parameter in () if self.module is None else self.module.parameters():
            if parameter.is_floating_point():
                numbers[parameter.dtype] += parameter.numel()
        return numbers.most_common(1)[0][0] if numbers else torch.float32

    def _parameter(self) -> torch.nn.Parameter | None:
        if self.module is None:
            return None
        return next((p for p in self.module.parameters() if p.is_floating_point()), None)

    def default_process(self, num_inference_steps: int) -> ReverseProcess:
        """The process of this model where the caller names none: the original DiT's."""
        from free.processes import ReverseProcess

        return ReverseProcess.ddpm(num_inference_steps)

    @abstractmethod
    def check_conditioning(
        self, class_labels: Any, conditioning: dict[str, Any] | None, guidance_scale: float, batch: int | None
    ) -> tuple[dict[str, Any], int | None]:
        """Check the caller's conditioning before any work is done.

        Args:
            class_labels: an int, one a sample, or None.
            conditioning: the model's keywords, or None.
            guidance_scale: 1 is no guidance.
            batch: how many samples the other arguments speak of; None if they do not say.

        Returns:
            The conditioning, tensors with a leading axis of samples, and how many samples it speaks of (None if it
            does not say).
        """

    @abstractmethod
    def forward(
        self, states: torch.Tensor, timestep: torch.Tensor, conditioning: dict[str, Any], guided: bool
    ) -> TargetOutput:
        """One forward of the model; arguments as in :meth:`evaluate`, but copies, and what is returned is copied, unless
        :attr:`needs_copies` says that neither is needed."""

    @property
    def needs_copies(self) -> bool:
        """Whether a forward may write into its input, or its output's memory is used again at the next one.

        Any model may do so, and code of ``torch.compile(mode="reduce-overhead")`` does. A subclass that knows that its
        network does neither says no, and saves a launch for each tensor: beside a small captured forward they are seen.
        """
        return True

    def evaluate(
        self, states: torch.Tensor, timestep: torch.Tensor, conditioning: dict[str, Any], guided: bool
    ) -> TargetOutput:
        """Evaluate N states in one forward (in as many as ``max_forward_batch`` asks for).

        The model may write into the tensors that it is given, and use the memory of its outputs again: it works on copies,
        and so does the caller, where :attr:`needs_copies`. What of the conditioning is no tensor is handed to it as it is.

        Args:
            states: float32 [N, *sample shape].
            timestep: [N].
            conditioning: what :meth:`check_conditioning` returned, each tensor [N, ...] row by row.
            guided: whether the unconditional half is wanted too.

        Returns:
            :class:`TargetOutput` of the N states, in their order.

        Raises:
            ValueError: the model returned something else than the shape of its input.
        """
        limit = self.forward_batch(guided)
        if limit is None or limit >= len(states):
            return self._safe_forward(states, timestep, conditioning, guided)
        rows = torch.arange(len(states), device=states.device)
        parts = [
            self._safe_forward(states[part], timestep[part], take_rows(conditioning, part), guided)
            for part in rows.split(limit)
        ]
        return TargetOutput(
            torch.cat([part.output for part in parts]),
            _cat_or_none([part.unconditional for part in parts]),
            _cat_or_none([part.feature for part in parts]),
            _cat_or_none([part.variance_share for part in parts]),
        )

    def _safe_forward(
        self, states: torch.Tensor, timestep: torch.Tensor, conditioning: dict[str, Any], guided: bool
    ) -> TargetOutput:
        if not self.needs_copies:
            return self.forward(states, timestep, conditioning, guided)
        # a state changed behind the sampler's back is another law
        conditioning = {name: _copy(value) for name, value in conditioning.items()}
        output = self.forward(_copy(states), _copy(timestep), conditioning, guided)
        return TargetOutput(
            _copy(output.output), _copy(output.unconditional), _copy(output.feature), _copy(output.variance_share)
        )

    def forward_batch(self, guided: bool) -> int | None:
        """States that fit in one forward; None is no bound."""
        if self.max_forward_batch is None:
            return None
        return max(1, self.max_forward_batch // (2 if guided else 1))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within this context :attr:`runs` counts one more: each has graphs of its own."""
        self.runs += 1
        try:
            yield
        finally:
            self.runs -= 1

    @contextmanager
    def capture_features(self) -> Iterator[None]:
        """Within this context :meth:`evaluate` also returns the top-block feature.

        Raises:
            ValueError: the model has none.
        """
        self.check_features()
        yield

    def check_features(self) -> tuple[int, int]:
        """:attr:`feature_shape`; raises a ValueError where the model has no such feature."""
        if self.feature_shape is None:
            raise ValueError(
                f"the drafter leans on the target's top-block feature, and {type(self).__name__} has none; "
                "use a DiTTransformer2DModel, or a drafter without features such as 'hold-x0'"
            )
        return self.feature_shape

    def label_embedding(self, conditioning: dict[str, Any]) -> torch.Tensor:
        """The class embedding [N, width] of the conditioning's rows, for drafters that have none of their own.

        Raises:
            ValueError: the model has none.
        """
        raise ValueError(f"the drafter leans on the target's label embedding, and {type(self).__name__} has none")

    @contextmanager
    def compile(self, *, dynamic: bool | None = True, **options: Any) -> Iterator[None]:
        """Within this context the model's forward runs under ``torch.compile(fullgraph=True)``.

        Compiled code stays with the process, so that another context finds it.

        Args:
            dynamic: of ``torch.compile``; True compiles once for all batch sizes but 1, False once for each, and None once
                for the first and once for the others.
            options: further ones of ``torch.compile``.

        Raises:
            ValueError: the model is no ``torch.nn.Module``.
        """
        if self.module is None:
            raise ValueError(f"compile is True, but model is a {type(self.model).__name__}; allowed is a torch.nn.Module")
        with ExitStack() as during:
            # several windows and models: more kinds of shapes than the usual limit allows
            during.enter_context(torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT))
            for i, module in enumerate(self._compiled_parts() if self.model is self.module else ()):
                if not i:
                    # the first part meets strides that the others do not, and would be compiled for them once more
                    during.callback(module.register_forward_pre_hook(_contiguous).remove)
                during.callback(_put_back_forward, module, vars(module).get("forward"))
                module.forward = torch.compile(module.forward, fullgraph=True, dynamic=dynamic, **options)
            during.callback(setattr, self, "compiled", self.compiled)
            during.callback(setattr, self, "_compile_options", self._compile_options)
            self.compiled, self._compile_options = True, options
            yield

    def _compiled_parts(self) -> Sequence[torch.nn.Module]:
        """Modules whose forwards are compiled, each on its own: repeated ones share the code."""
        assert self.module is not None
        return [self.module]

    def check_learned_variance(self) -> None:
        """Raise a ValueError if the model predicts no variance."""
        if not self.learns_variance:
            raise ValueError(
                "model has no learned-variance channels; allowed is a DiTTransformer2DModel with twice as many output as "
                "input channels"
            )

    @contextmanager
    def capture_variance(self) -> Iterator[None]:
        """Within this context :meth:`evaluate` also returns the learned variance's share.

        Raises:
            ValueError: the model predicts none.
        """
        self.check_learned_variance()
        before, self._capturing_variance = self._capturing_variance, True
        try:
            yield
        finally:
            self._capturing_variance = before


def has_rows(value: Any) -> bool:
    """Whether a value of the conditioning is one row a sample (else it is passed through as it is)."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def take_rows(conditioning: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """The conditioning of the given rows (int64 [N]); what has no rows is kept."""
    return {name: value[rows] if has_rows(value) else value for name, value in conditioning.items()}


def _copy(value: Any) -> Any:
    """In memory of its own, if it is a tensor."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _contiguous(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.contiguous() if isinstance(value, torch.Tensor) else value for value in inputs)


def _cat_or_none(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def check_output(output: Any, states: torch.Tensor) -> torch.Tensor:
    """A model's output must be a floating tensor of its input's shape."""
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"model returned a {type(output).__name__}; allowed is a tensor (or an object with .sample)")
    if output.shape != states.shape:
        raise ValueError(
            f"model returned shape {tuple(output.shape)} for states of shape {tuple(states.shape)}; they must agree"
        )
    if not output.is_floating_point():
        raise ValueError(f"model returned dtype {output.dtype}; allowed is a floating dtype")
    return output


def _put_back_forward(module: torch.nn.Module, before: Any) -> None:
    """A forward of the instance's own, as hooks and another compilation give it, or the class's."""
    if before is None:
        vars(module).pop("forward", None)
    else:
        module.forward = before
