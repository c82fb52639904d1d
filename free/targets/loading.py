"""A DiT in a folder, and what it is recognised by wherever it is stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from free.targets.dit import DiTTarget


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_target(folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None) -> DiTTarget:
    """The DiT in a folder, in eval mode.

    Args:
        folder: as ``save_pretrained`` writes it.
        dtype: of its weights.
        device: left out, the GPU if there is one.

    Raises:
        FileNotFoundError: the folder is not there, or holds no ``config.json``.
        ValueError: it holds something else than a whole DiT.
    """
    from diffusers import DiTTransformer2DModel
    from safetensors import SafetensorError

    if (folder / "model_index.json").is_file():
        raise ValueError(f"model is {str(folder)!r}, which is a pipeline; give {str(folder / 'transformer')!r}, its DiT")
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no model in {str(folder)!r}: expected config.json and safetensors, as DiTTransformer2DModel.save_pretrained "
            "writes them"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        name = config.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is no model's configuration: {error}") from error
    if name != "DiTTransformer2DModel":
        raise ValueError(f"model in {str(folder)!r} is a {name}; allowed is a DiTTransformer2DModel")
    try:
        model, report = DiTTransformer2DModel.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model in {str(folder)!r} cannot be loaded: {error}") from error
    # diffusers fills what is missing with random numbers
    if report["missing_keys"]:
        raise ValueError(f"model in {str(folder)!r} lacks the weights {', '.join(sorted(report['missing_keys'])[:3])} …")
    return DiTTarget(model.eval().to(default_device() if device is None else device))


def load_pipeline(
    word: str, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> tuple[DiTTarget, Any]:
    """The DiT of a folder or of a pipeline, with its scheduler, and the VAE that decodes its samples.

    Args:
        word: the folder of a DiT, or of a ``DiTPipeline``, or a pipeline's name on the hub.
        dtype: of the DiT's weights. The VAE's are float32: it decodes once a sample, and some overflow in half a precision.
        device: left out, the GPU if there is one.

    Returns:
        The target, in eval mode, and the VAE; None for a DiT alone.

    Raises:
        FileNotFoundError: the folder is not there, and no pipeline of that name either.
        ValueError: it holds something else than a whole DiT or DiTPipeline.
    """
    folder = Path(word)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        return load_target(folder, dtype, device), None
    if not folder.is_dir() and word.count("/") != 1:
        raise FileNotFoundError(
            f"no model in {word!r}: expected the folder of a DiT or of a DiTPipeline, or a name on the hub"
        )
    from diffusers import DiTPipeline

    try:
        if not folder.is_dir():
            folder = Path(DiTPipeline.download(word, use_safetensors=True))
        name = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
        if name != DiTPipeline.__name__:
            raise ValueError(f"model {word!r} is a {name}; allowed are a DiTPipeline and a DiTTransformer2DModel")
        target = load_target(folder / "transformer", dtype, device)
        pipe = DiTPipeline.from_pretrained(
            folder, transformer=target.transformer, torch_dtype=torch.float32, use_safetensors=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"model {word!r} cannot be loaded: {error}") from error
    return DiTTarget(target.transformer, scheduler=pipe.scheduler), pipe.vae.eval().to(target.device)


def fingerprint(target: DiTTarget) -> str:
    """Sixteen hexadecimal digits that follow from the model's configuration and weights, wherever they are stored."""
    config = {name: value for name, value in target.transformer.config.items() if not name.startswith("_")}
    state = target.transformer.state_dict()
    return digest((state[name] for name in sorted(state)), json.dumps(config, sort_keys=True, default=str))


def digest(tensors: Iterable[torch.Tensor], text: str = "") -> str:
    """Sixteen hexadecimal digits of the tensors' dtypes, shapes and bytes, and of ``text``."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
