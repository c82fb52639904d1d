"""What a shard of samples is on disk: pixels as PNG files or as rows of one ``.npz``, or the latents themselves."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from free.data.archives import write_images
from free.parallel.shards import ShardFolder

_PER_FOLDER = 1000


class Format(ABC):
    """How samples are stored."""

    name: str
    pixels = True
    """Whether images are stored, and not the numbers that the model made."""
    final: str | None = None
    """A file of all samples, made when all shards are there; None where the shards' own files are the result."""

    @abstractmethod
    def files(self, number: int, first: int, values: np.ndarray, labels: list[int] | None) -> dict[str, bytes]:
        """A shard's files by their path.

        Args:
            number: the shard's.
            first: index of its first sample.
            values: uint8 [n, height, width, channels]; of latents float32 [n, *sample shape].
            labels: of the samples.
        """

    def finish(self, folder: ShardFolder, num_samples: int) -> None:  # noqa: B027 - most have nothing left to do
        """Make :attr:`final` of the shards."""


class Png(Format):
    """``00/000123.png``: a file a sample, a folder a thousand; grey where there is one channel."""

    name = "png"

    def files(self, number: int, first: int, values: np.ndarray, labels: list[int] | None) -> dict[str, bytes]:
        from PIL import Image

        contents = {}
        for i, pixels in enumerate(values, start=first):
            buffer = io.BytesIO()
            Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, format="PNG")
            contents[f"{i // _PER_FOLDER:02}/{i:06}.png"] = buffer.getvalue()
        return contents


class Npz(Format):
    """``samples.npz``: ``arr_0`` uint8 [N, height, width, channels], ``arr_1`` the labels; made of the shards at the end."""

    name = "npz"
    final = "samples.npz"

    def files(self, number: int, first: int, values: np.ndarray, labels: list[int] | None) -> dict[str, bytes]:
        buffer = io.BytesIO()
        np.save(buffer, values, allow_pickle=False)
        return {f"shards/{number:06}.npy": buffer.getvalue()}

    def finish(self, folder: ShardFolder, num_samples: int) -> None:
        def parts() -> Iterator[np.ndarray]:
            for number in range(folder.count):
                (content,) = folder.read(number).values()
                yield np.load(io.BytesIO(content), allow_pickle=False)

        labels = [folder.record(number)["labels"] for number in range(folder.count)]
        given = None if labels[0] is None else np.concatenate([np.asarray(part, dtype=np.int64) for part in labels])
        image = next(parts()).shape[1:]
        with folder.part_of(self.final) as path:
            write_images(path, parts(), (num_samples, *image), given)


class Latents(Format):
    """``latents/000012.safetensors``: a file a shard, ``samples`` float32 [n, *sample shape] and ``labels`` int64 [n]."""

    name = "latents"
    pixels = False

    def files(self, number: int, first: int, values: np.ndarray, labels: list[int] | None) -> dict[str, bytes]:
        from safetensors.numpy import save

        arrays = {"samples": values}
        if labels is not None:
            arrays["labels"] = np.asarray(labels, dtype=np.int64)
        return {f"latents/{number:06}.safetensors": save(arrays)}


FORMATS: dict[str, type[Format]] = {kind.name: kind for kind in (Png, Npz, Latents)}


class Pixels:
    """Makes images of samples: by a VAE, a chunk at a time, or of what the model makes as it is, [-1, 1].

    Args:
        vae: an ``AutoencoderKL`` in eval mode, or None.
        chunk: samples decoded at once, to bound memory.
    """

    def __init__(self, vae: Any = None, chunk: int = 8) -> None:
        self.vae, self.chunk = vae, chunk

    def __call__(self, samples: torch.Tensor) -> np.ndarray:
        """uint8 [n, height, width, channels] of samples [n, channels, height, width]."""
        return np.concatenate([_to_bytes(self._decode(part)) for part in samples.split(self.chunk)])

    def fits(self, sample_shape: Sequence[int]) -> bool:
        """Whether samples of this shape are images of one or three channels, or can be decoded to some."""
        return self.vae is not None or (len(sample_shape) == 3 and sample_shape[0] in (1, 3))

    @torch.no_grad()
    def _decode(self, samples: torch.Tensor) -> torch.Tensor:
        if self.vae is None:
            return samples
        latents = samples.to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents, return_dict=False)[0]


def _to_bytes(images: torch.Tensor) -> np.ndarray:
    scaled = (images.float() / 2 + 0.5).clamp(0, 1).mul(255).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
