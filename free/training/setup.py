"""What a training run begins with: processes, seeds, the target and its VAE, weights to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from free.data.digits import weights_path
from free.drafters.feature import FeatureDrafter
from free.targets import DiTTarget, as_target
from free.targets.loading import load_target
from free.training.config import DrafterTrainingConfig


def make_accelerator(config: DrafterTrainingConfig) -> Any:
    """As ``accelerate launch`` started it; refuses what is more than copies of the drafter side by side."""
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType

        if config.report_to == "tensorboard":
            import tensorboard  # noqa: F401 - accelerate would find out when training begins
    except ImportError as error:
        raise ImportError(f"training needs {error.name}: pip install 'free-dit[train]'") from error
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=Path(config.output_dir) / "logs",
        # the block runs twice before a backward, and its buffers never change
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    allowed = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in allowed:
        names = ", ".join(kind.value for kind in allowed)
        raise ValueError(f"accelerate was launched as {accelerator.distributed_type.value}; allowed are {names}")
    return accelerator


def set_seeds(seed: int) -> None:
    """Of all generators: torch's, NumPy's, Python's."""
    from accelerate.utils import set_seed

    set_seed(seed)


def take_weights(drafter: FeatureDrafter, folder: str) -> None:
    """Those of the drafter in ``folder``, whose base may be another."""
    if not Path(folder).is_dir():
        raise ValueError(f"begin_with is {folder!r}, which is no folder")
    try:
        drafter.load_state_dict(FeatureDrafter.from_pretrained(folder).state_dict())
    except RuntimeError as error:
        raise ValueError(f"begin_with is {folder!r}, whose weights do not fit this drafter: {error}") from error


def load_target_and_vae(config: DrafterTrainingConfig, model: Any) -> tuple[DiTTarget, Any]:
    """The target, and the VAE that encodes its images (None where there is none to use)."""
    name = config.pretrained_model_name_or_path
    if model is not None and name is not None:
        raise ValueError(f"model was given, and pretrained_model_name_or_path {name!r} too; give one of them")
    if model is None:
        model = _load_pretrained(name)
    target = as_target(model)
    target.check_features()
    vae = None
    if config.train_data_dir is not None:
        if config.vae is not None:
            from diffusers import AutoencoderKL

            vae = AutoencoderKL.from_pretrained(config.vae, use_safetensors=True)
        else:
            vae = getattr(model, "vae", None)
    return cast(DiTTarget, target), vae


def _load_pretrained(name: str | None) -> Any:
    folder = Path(name) if name is not None else weights_path()
    if name is None or (folder.is_dir() and not (folder / "model_index.json").is_file()):
        return load_target(folder)
    # a folder that is not there may be a name on the hub
    if folder.is_dir() or folder.as_posix().count("/") == 1:
        from diffusers import DiTPipeline

        return DiTPipeline.from_pretrained(name, use_safetensors=True)
    return load_target(folder)
