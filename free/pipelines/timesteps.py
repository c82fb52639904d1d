"""A scheduler's timesteps as a pipeline iterates them: by rounds, until all samples are finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from free.pipelines.errors import UnsupportedPipelineError
from free.pipelines.rows import change_tensors


class Driver(Protocol):
    """Who turns an iteration into rounds."""

    def iterate(self, timesteps: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
        """What a ``for`` over ``timesteps``, the scheduler's from step ``first`` on, is given."""

    @property
    def iterating(self) -> bool:
        """Whether such a loop is under way."""


class Timesteps(torch.Tensor):
    """[S], or what a pipeline cut out of it: its length is the steps', what it yields are rounds."""

    first: int
    driver: Driver

    @classmethod
    def of(cls, values: torch.Tensor, driver: Driver, first: int = 0) -> Timesteps:
        timesteps = values.as_subclass(cls)
        timesteps.first, timesteps.driver = first, driver
        return timesteps

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.driver.iterate(self.as_subclass(torch.Tensor), self.first)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).clone()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            plain_args, plain_kwargs = change_tensors((args, kwargs or {}), _plain)
            result = func(*plain_args, **plain_kwargs)
        source = args[0] if args else None
        if not isinstance(source, Timesteps) or not isinstance(result, torch.Tensor):
            return result
        if func is torch.Tensor.__getitem__:
            if isinstance(args[1], slice) and result.dim() == 1:
                start, _, stride = args[1].indices(len(plain_args[0]))
                return cls.of(result, source.driver, source.first + start) if stride == 1 else result
            if result.dim() == 0 and source.driver.iterating:
                raise UnsupportedPipelineError(
                    "the pipeline looks up timesteps by the number of the round, which is not the number of a step; it "
                    "cannot be speculated"
                )
        elif func in _SAME and result.shape == plain_args[0].shape:
            return cls.of(result, source.driver, source.first)
        return result


_SAME = {torch.Tensor.to, torch.Tensor.clone, torch.Tensor.detach, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.float}


def _plain(values: torch.Tensor) -> torch.Tensor:
    return values.as_subclass(torch.Tensor) if isinstance(values, Timesteps) else values
