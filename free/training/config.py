"""What a training run of a drafter is told, by Python or by the command line."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from diffusers.optimization import SchedulerType

from free.checks import check_count
from free.data.images import BUILT_IN
from free.training.loss import LOSSES

BASES = ("gains", "hold-x0", "none")
STATES = ("windows", "noised")
MIXED_PRECISIONS = ("no", "fp16", "bf16")
DTYPES = ("float32", "float16", "bfloat16")
TRACKERS = ("tensorboard", "none")
# a piecewise constant one would need rules
SCHEDULES = tuple(kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT)


def _option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class DrafterTrainingConfig:
    """Settings of :func:`train_drafter`, named as in diffusers' training examples where they have the option.

    ``base="none", states="noised"`` is FREE's training (arXiv 2511.20390), the other defaults being the paper's; 512 × 512
    models take ``smooth_weight=0.01`` there.

    Raises:
        ValueError: a value that is not allowed.
    """

    output_dir: str = field(metadata={"help": "where the drafter, its checkpoints and its log go"})
    pretrained_model_name_or_path: str | None = _option(
        None,
        "folder of a saved DiTTransformer2DModel or DiTPipeline, or a pipeline's name; the digits DiT if left out",
    )
    dataset: str | None = _option(None, "built-in data, instead of a folder", BUILT_IN)
    train_data_dir: str | None = _option(None, "folder of images, a sub-folder for each class in sorted order")
    resolution: int | None = _option(None, "pixels a side; what the model needs if left out")
    vae: str | None = _option(None, "AutoencoderKL that encodes the images, folder or name; the pipeline's if it has one")
    subset: float = _option(0.3, "share of the data that is used")
    skip_unreadable: bool = _option(False, "leave out images that cannot be read")
    dataloader_num_workers: int = _option(0, "processes that read images")

    base: str = _option("gains", "what the drafter's output is added to", BASES)
    begin_with: str | None = _option(None, "folder of a trained drafter whose weights come first; new ones if left out")
    sweeps: int | None = _option(None, "sweeps of a draft, 0 for one step after the other; the drafter's own if left out")
    states: str = _option("windows", "states to learn on: those that windows visit, or noised data", STATES)
    num_inference_steps: tuple[int, ...] = _option((250,), "steps S of inference, several are taken in turn")
    window: int = _option(8, "W of the visited windows, and of validation")
    reuse: int = _option(1, "times that each round of windows is learned from; more pays where the target is slow")
    unroll: int = _option(1, "drafts in a row on noised data")
    depth_weight: float = _option(0.8, "weight of each of them relative to the one before")
    guidance_scale: float = _option(1.5, "classifier-free guidance of the outputs that are learned; 1 is none")
    loss: str | None = _option(None, "of the output; mse for base none, else log-delta, if left out", LOSSES)
    feature_weight: float = _option(0.5, "of the feature's squared error")
    smooth_weight: float = _option(0.005, "of the feature's change")
    label_dropout: float = _option(0.1, "share of labels that become the null class")

    seed: int = _option(0, "of everything random")
    train_batch_size: int = _option(32, "samples of a step and process: live ones with their windows, or noised ones")
    max_train_steps: int = _option(10_000, "optimizer steps in all")
    gradient_accumulation_steps: int = _option(1, "batches of one optimizer step")
    learning_rate: float = _option(1e-4, "AdamW's")
    lr_scheduler: str = _option("constant", "of the learning rate", SCHEDULES)
    lr_warmup_steps: int = _option(0, "of the schedule")
    adam_weight_decay: float = _option(0.0, "AdamW's")
    max_grad_norm: float = _option(1.0, "gradients are clipped to it")
    use_ema: bool = _option(True, "save the moving average of the weights")
    ema_decay: float = _option(0.9999, "of the average, reached gradually")
    mixed_precision: str = _option("no", "precision of the frozen target and of the drafter's products", MIXED_PRECISIONS)

    checkpointing_steps: int = _option(500, "steps between checkpoints")
    checkpoints_total_limit: int | None = _option(None, "checkpoints that are kept")
    resume_from_checkpoint: str | None = _option(None, "latest, or a checkpoint's folder")
    validation_steps: int = _option(500, "steps between validations")
    validation_samples: int = _option(8, "samples of the real parallel efficiency; 0 leaves it out")
    report_to: str = _option("tensorboard", "where losses are logged", TRACKERS)
    save_dtype: str = _option("float32", "of the saved drafter", DTYPES)

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value, choices = getattr(self, entry.name), entry.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise ValueError(f"{entry.name} is {value!r}; allowed are {', '.join(map(repr, choices))}")
        if self.base == "gains" and self.states == "noised":
            raise ValueError("states is 'noised' with base 'gains', which learn from a run; allowed is 'windows'")
        object.__setattr__(self, "num_inference_steps", tuple(self.num_inference_steps))
        if not self.num_inference_steps:
            raise ValueError("num_inference_steps is empty; at least one is needed")
        for steps in self.num_inference_steps:
            check_count("num_inference_steps", steps, least=2, why="as the last step is never drafted")
        least = {
            "train_batch_size": 1, "max_train_steps": 1, "gradient_accumulation_steps": 1, "checkpointing_steps": 1,
            "validation_steps": 1, "window": 2, "unroll": 1, "reuse": 1, "guidance_scale": 1, "seed": 0,
            "validation_samples": 0, "lr_warmup_steps": 0, "feature_weight": 0, "smooth_weight": 0, "adam_weight_decay": 0,
            "checkpoints_total_limit": 1, "dataloader_num_workers": 0,
        }  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{name} is {value}; allowed is {bound} or more")
        for name in ("learning_rate", "max_grad_norm", "depth_weight", "subset"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is more than 0")
        for name in ("subset", "label_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is 0 … 1")

    @property
    def loss_kind(self) -> str:
        """The loss that is used."""
        return self.loss or ("mse" if self.base == "none" else "log-delta")


_FREE_TO_CHANGE = {
    "output_dir", "pretrained_model_name_or_path", "train_data_dir", "resolution", "skip_unreadable",
    "dataloader_num_workers", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
    "validation_steps", "validation_samples", "report_to", "save_dtype",
}  # fmt: skip


def continued(config: DrafterTrainingConfig) -> dict[str, Any]:
    """What a run that continues another must share with it: all that changes the weights, less what the data and the model
    themselves tell.

    The number of steps may grow while the learning rate does not depend on it.
    """
    free = _FREE_TO_CHANGE | ({"max_train_steps"} if config.lr_scheduler.startswith("constant") else set())
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    return {**values, "loss": config.loss_kind}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option of the command line for each field."""
    hints = typing.get_type_hints(DrafterTrainingConfig)
    for entry in dataclasses.fields(DrafterTrainingConfig):
        kind = hints[entry.name]
        if isinstance(kind, types.UnionType):  # optional
            kind = typing.get_args(kind)[0]
        options: dict[str, Any] = {"help": entry.metadata["help"], "choices": entry.metadata.get("choices"), "type": kind}
        if entry.default is dataclasses.MISSING:
            options["required"] = True
        else:
            options["default"] = entry.default
        if kind is bool:
            options = {"help": options["help"], "default": entry.default, "action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is tuple:
            options |= {"nargs": "+", "type": typing.get_args(kind)[0]}
        # as diffusers' training scripts write it, and as the other commands do
        names = dict.fromkeys((f"--{entry.name}", f"--{entry.name.replace('_', '-')}"))
        parser.add_argument(*names, **options)
