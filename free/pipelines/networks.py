"""Networks that are shown states of one round while their caller prepared conditioning for its samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from free.pipelines.batch import Repeated
from free.pipelines.errors import UnsupportedPipelineError
from free.pipelines.rows import Layout, Rows, Timestep, change_tensors, plain, tensors_in

TIMESTEP_NAMES = ("timestep", "timesteps", "t")
"""What networks call the timestep."""

_ROUNDING = 2.0**-7
"""Between one order of operations and another, in the coarsest dtype."""
_WITHOUT_ROWS = (
    "image_rotary_emb", "freqs_cis", "ip_adapter_masks", "rope_interpolation_scale", "visual_rope_pos", "text_rope_pos",
    "control_hidden_states_scale",
)  # fmt: skip
"""Arguments of one value for all samples, whatever their shape."""
_ROWS_SECOND = ("encoder_hidden_states_llama3",)
"""Arguments [layers, samples, ...]."""
_LISTS = ("img_shapes", "txt_seq_lens")
"""Lists of numbers with an entry a sample."""
_POSITIONS = ("img_ids", "txt_ids")
"""Positions of tokens: [tokens, axes] for all samples, or [samples, tokens, axes]."""


def networks_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """The components of a pipeline that take a timestep, by name."""
    return {
        name: module
        for name, module in pipe.components.items()
        if isinstance(module, torch.nn.Module) and timestep_name(module) is not None
    }


def timestep_name(module: torch.nn.Module) -> str | None:
    """What a network calls its timestep; None if it takes none."""
    return next((name for name in TIMESTEP_NAMES if name in _parameters(module)), None)


def _parameters(module: torch.nn.Module) -> list[str]:
    """The names of what a network's forward takes; of one made by ``torch.compile(module)`` or by PEFT, what the one inside
    takes.
    """
    inside = getattr(module, "_orig_mod", module)
    if hasattr(inside, "get_base_model"):
        inside = inside.get_base_model()  # type: ignore[operator]
    return list(inspect.signature(inside.forward).parameters)


class Network:
    """Calls one network for a pipeline's loop: rows of the conditioning for the states, and a timestep for each."""

    def __init__(
        self, name: str, module: torch.nn.Module, num_train_timesteps: int, repeated: Repeated | None = None
    ) -> None:
        self.name, self.module, self.repeated = name, module, repeated
        self.parameters = _parameters(module)
        self.timestep_name = timestep_name(module)
        self._compiled = "_compiled_call_impl" in module.__dict__ or hasattr(module, "_orig_mod")
        self.recipes = _recipes(num_train_timesteps)
        """What the pipeline may make of the loop's timestep where only a number arrives; those that never failed."""
        self.calls: list[Hashable] = []
        """Name, compilation and input shapes of the first round's calls."""

    @contextmanager
    def wrapped(self, shown_first: Callable[[], torch.Tensor | None]) -> Iterator[None]:
        """Within this context the module's calls go through :meth:`__call__`.

        Args:
            shown_first: the loop's timestep in its first round, where all rows have the same; else None.
        """
        # not by ``forward``: what torch.compile has made of the module must stay as it is
        # nor by setattr, which a module made by torch.compile(module) hands on to the one inside
        kept = self.module.__dict__
        own = kept.get("_compiled_call_impl")
        call = own or self.module._call_impl

        def through(*args: Any, **kwargs: Any) -> Any:
            shown = shown_first()
            if shown is not None:
                self._learn(args, kwargs, shown)
            return self(call, args, kwargs)

        kept["_compiled_call_impl"] = through
        try:
            yield
        finally:
            del kept["_compiled_call_impl"]
            if own is not None:
                kept["_compiled_call_impl"] = own

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = next((one for one in tensors_in((args, kwargs)) if isinstance(one, (Rows, Timestep))), None)
        if known is None:
            return call(*args, **kwargs)
        layout = known.place
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        states = named[self.parameters[0]]
        inner = states.inner_rows if isinstance(states, Rows) else 1
        groups, rest = divmod(len(states), len(layout) * inner)
        if rest or not groups:
            raise UnsupportedPipelineError(
                f"{self.name} is called with {len(states)} rows where the round has {len(layout)} states; the pipeline "
                "works with a fixed number of rows and cannot be speculated (mode='batch' may allow it)"
            )

        def change(name: str, value: Any) -> Any:
            if name == self.parameters[0]:
                return change_tensors(value, plain)
            if name == self.timestep_name:
                # one number may be on the host, a row's may not
                return self._timestep(value, layout, groups, inner).to(states[0].device)
            if isinstance(value, list) and (name in _LISTS or isinstance(states, list)):
                return self._entries(value, layout, groups)
            return self._rows(name, value, layout, groups, inner)

        positional = [change(name, value) for name, value in zip(self.parameters, args, strict=False)]
        by_name = {name: change(name, value) for name, value in kwargs.items()}
        output = call(*positional, *args[len(positional) :], **by_name)
        rows = groups * len(layout) * inner

        def tag(values: torch.Tensor) -> torch.Tensor:
            return Rows.of(values, layout, inner) if values.dim() and values.shape[0] == rows else values

        return change_tensors(output, tag)

    def _learn(self, args: tuple[Any, ...], kwargs: dict[str, Any], shown: torch.Tensor) -> None:
        """Note what the pipeline made of the timestep ``shown`` [] of all rows."""
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        if self.repeated is not None:
            with_rows = {name: value for name, value in named.items() if name not in (*_WITHOUT_ROWS, *_POSITIONS)}
            self.repeated.check_arguments(self.name, self.parameters[0], with_rows)
        states = tuple(tuple(values.shape) for values in tensors_in(named[self.parameters[0]]))
        self.calls.append((self.name, self._compiled, states))
        given = named.get(self.timestep_name or "")
        if isinstance(given, torch.Tensor):
            self.recipes = self._fitting(given, shown) or self.recipes

    def _rows(self, name: str, value: Any, layout: Layout, groups: int, inner: int) -> Any:
        """A value of the conditioning, nested or not, with a row for each state."""

        def change(values: torch.Tensor) -> torch.Tensor:
            if isinstance(values, Timestep) and bool((values.each != values.each[0]).any()):
                raise UnsupportedPipelineError(
                    f"{self.name} is given what the pipeline made of the timestep as {name!r}, in which the states of a "
                    "round differ; it cannot be speculated"
                )
            if isinstance(values, (Rows, Timestep)):
                return plain(values)
            if name in _POSITIONS and values.dim() < 3:
                return values
            if name in _ROWS_SECOND and values.dim() > 1 and values.shape[1] == groups * layout.batch * inner:
                return values[:, layout.index(groups, inner).to(values.device)]
            rows = groups * layout.batch
            if name == "encoder_hidden_states" and values.dim() and values.shape[0] % rows == 0:
                # a prompt a frame where the network makes rows of frames
                return values[layout.index(groups, values.shape[0] // rows).to(values.device)]
            if values.dim() and values.shape[0] == rows * inner:
                return values[layout.index(groups, inner).to(values.device)]
            return values

        if name in _WITHOUT_ROWS:
            return change_tensors(value, plain)
        if type(value) is dict:
            return {key: self._rows(key, entry, layout, groups, inner) for key, entry in value.items()}
        return change_tensors(value, change)

    def _entries(self, value: list[Any], layout: Layout, groups: int) -> list[Any]:
        """A list with an entry a sample, for a network that takes its states as a list."""
        if len(value) != groups * layout.batch:
            return value
        return [value[row] for row in layout.index(groups, 1).tolist()]

    def _timestep(self, given: Any, layout: Layout, groups: int, inner: int) -> torch.Tensor:
        """Each row's own timestep, as the pipeline would have made it."""
        if isinstance(given, Timestep) and given.each.dim() == 1:
            return given.each.repeat(groups).repeat_interleave(inner)
        rows = groups * len(layout) * inner
        if isinstance(given, Rows):
            if len(given) == rows:
                return plain(given)
            return plain(given)[: len(layout)].repeat(groups).repeat_interleave(inner)
        given = plain(given) if isinstance(given, torch.Tensor) else torch.as_tensor(given)
        self.recipes = self._fitting(given, layout.shown)
        own = layout.timestep.repeat(groups).repeat_interleave(inner)
        made = [recipe(own, given.dtype) for recipe in self.recipes]
        # those that are left may differ in rounding
        if not made or any(not torch.allclose(one.float(), made[0].float(), rtol=_ROUNDING) for one in made):
            raise UnsupportedPipelineError(
                f"{self.name} is given timestep {given.flatten()[0].item()} where the loop has {layout.shown.item()}; what "
                "the pipeline made of it is not known, so that states of other timesteps cannot be told theirs"
            )
        if given.dim() < 2:
            return made[0]
        # a timestep a token, zero at those that are given
        each = made[0].view(-1, *(1,) * (given.dim() - 1))
        tokens = given if len(given) == rows else given[:1]
        return torch.where(tokens == 0, torch.zeros_like(each), each)

    def _fitting(self, given: torch.Tensor, shown: torch.Tensor) -> list[Callable[..., torch.Tensor]]:
        """The recipes by which ``given`` may have been made of ``shown``."""
        seen = given[given != 0] if given.dim() >= 2 else given
        return [recipe for recipe in self.recipes if bool((seen == recipe(shown, given.dtype)).all())]


def _recipes(num_train_timesteps: int) -> list[Callable[..., torch.Tensor]]:
    """What pipelines make of the loop's timestep: itself, a share of the training steps, or the rest of them; rounded to
    the network's dtype before or after.
    """
    count = num_train_timesteps
    return [
        lambda t, dtype: t.to(dtype),
        lambda t, dtype: t.to(dtype) / count,
        lambda t, dtype: (t / count).to(dtype),
        lambda t, dtype: 1 - t.to(dtype) / count,
        lambda t, dtype: (1 - t / count).to(dtype),
        lambda t, dtype: (count - t.to(dtype)) / count,
        lambda t, dtype: ((count - t) / count).to(dtype),
    ]
