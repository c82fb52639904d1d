"""``mode="batch"``: the pipeline is called with W rows of its own for each sample, so that nothing is ragged.

Some pipelines forbid another number of rows between two steps: they count latents by the number of prompts. They are asked
for W times as many images of each prompt, all W rows of a sample begin in the same state, and from then on a row is one of
its window's states. In the first round these rows must be answered alike: whatever the pipeline made for each row on its
own, such as a draw from an autoencoder's distribution, shows there, before anything was drafted.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from free.pipelines.errors import UnsupportedPipelineError

MODES = ("ragged", "batch")
"""How the states of a round become rows of a pipeline."""
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")
"""What calls call the number of samples that are drawn for each prompt."""
_ANSWERS = ("residual", "controlnet_hidden", "controlnet_block", "controlnet_single")
"""Within the names of arguments that are another network's answers, whose rounding may differ from row to row."""
_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the largest output, between rows of one batch."""


class Repeated:
    """A call of a pipeline whose samples have ``width`` rows each.

    Args:
        pipeline: its class.
        width: W.

    Raises:
        UnsupportedPipelineError: the pipeline cannot be asked for several images of a prompt, or begins from pictures.
    """

    def __init__(self, pipeline: type, width: int) -> None:
        name, self.width = pipeline.__name__, width
        taken = inspect.signature(pipeline.__call__).parameters
        count = next((one for one in _COUNTS if one in taken), None)
        if count is None or not hasattr(pipeline, "prepare_latents"):
            raise UnsupportedPipelineError(
                f"mode is 'batch', but a {name} cannot be asked for several samples of a prompt; allowed is 'ragged'"
            )
        if "strength" in taken:
            raise UnsupportedPipelineError(
                f"mode is 'batch', but a {name} begins from pictures, whose rows cannot be told from those of other "
                "samples; allowed is 'ragged'"
            )
        self.count = count
        self._prepare: Callable[..., Any] = pipeline.prepare_latents
        self._signature = inspect.signature(self._prepare)
        if "batch_size" not in self._signature.parameters:
            raise UnsupportedPipelineError(
                f"mode is 'batch', but prepare_latents of a {name} takes no batch_size; allowed is 'ragged'"
            )

    def ask(self, arguments: dict[str, Any]) -> None:
        """Ask for W times as many samples of each prompt, in place."""
        arguments[self.count] = (arguments.get(self.count) or 1) * self.width

    def prepare_latents(self) -> Callable[..., Any]:
        """The pipeline's method of this name: the latents that it would draw for B samples, W rows of each."""

        @functools.wraps(self._prepare)
        def prepare_latents(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            return self._prepared(self._signature.bind(pipe, *args, **kwargs))

        return prepare_latents

    def _prepared(self, bound: inspect.BoundArguments) -> Any:
        given = bound.arguments
        # some are told the number of prompts and of samples a prompt, the others their product
        each = self.count if self.count in given else "batch_size"
        if given[each] % self.width:
            raise UnsupportedPipelineError(
                f"mode is 'batch', but the pipeline asks its prepare_latents for {each}={given[each]}, which is no multiple "
                f"of the window {self.width}; allowed is 'ragged'"
            )
        given[each] //= self.width
        made = self._prepare(*bound.args, **bound.kwargs)
        latents, *others = made if isinstance(made, tuple) else (made,)
        if not isinstance(latents, torch.Tensor):
            raise UnsupportedPipelineError(
                f"mode is 'batch', but the pipeline's latents are a {type(latents).__name__}; allowed is 'ragged'"
            )
        repeated = latents.repeat_interleave(self.width, 0)
        return (repeated, *others) if isinstance(made, tuple) else repeated

    def check_arguments(self, network: str, first: str, arguments: dict[str, Any]) -> None:
        """Raise unless all rows of a sample meet the same arguments of a network in the first round.

        Args:
            network, first: its name, and that of its first argument, which is the states.
            arguments: by name, those that have no rows left out.
        """
        rows = len(arguments[first])
        for name, value in arguments.items():
            if any(words in name for words in _ANSWERS):
                continue
            entries = value if isinstance(value, list) and len(value) == rows else [value]
            stacked = torch.stack(entries) if len(entries) == rows and _stackable(entries) else value
            if isinstance(stacked, torch.Tensor) and stacked.dim() and len(stacked) == rows and not self._same(stacked):
                raise UnsupportedPipelineError(
                    f"mode is 'batch', but {network} is given another {name} for each row of one sample (drawn after the "
                    "samples were repeated?); allowed is 'ragged', if the pipeline can be speculated"
                )

    def _same(self, values: torch.Tensor) -> bool:
        """Whether the rows of a sample are equal in values [groups * B * W * inner, ...]; inner rows are its frames."""
        for inner in (1, *(size for size in range(2, len(values) // self.width + 1) if len(values) % size == 0)):
            if len(values) % (self.width * inner) == 0:
                each = values.unflatten(0, (-1, self.width, inner))
                if torch.equal(each, each[:, :1].expand_as(each)):
                    return True
        return False

    def check_output(self, output: torch.Tensor) -> None:
        """Raise unless the rows [B * W, ...] of each sample were answered alike in the first round."""
        each = output.unflatten(0, (-1, self.width)).float()
        difference = (each - each[:, :1]).abs().max()
        if difference > _ROUNDING.get(output.dtype, 0.0) * each.abs().max():
            raise UnsupportedPipelineError(
                "mode is 'batch', but the pipeline answers the rows of one sample, which are the same state, differently: "
                "something in it was drawn or chosen for each row; allowed is 'ragged', if the pipeline can be speculated"
            )


def _stackable(entries: list[Any]) -> bool:
    return all(isinstance(one, torch.Tensor) and one.shape == entries[0].shape for one in entries)
