"""What drafters are trained on: image folders and the built-in sets, as the latents that the target takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

BUILT_IN = ("digits", "photos")
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "china", "flower")
PATCH = 32

_NAMED = 3  # files that a message names
_PATCHES = 2**16  # of the photographs, in the set of them


def photographs() -> list[torch.Tensor]:
    """The source photographs at half size, float32 [3, height, width] in [-1, 1], in the order of :data:`PHOTOGRAPHS`.

    They ship with scikit-image and scikit-learn.
    """
    try:
        from skimage import data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ImportError(f"the photographs need {error.name}: pip install 'free-dit[train]'") from error
    images = [getattr(data, name)() for name in PHOTOGRAPHS[:4]]
    images += [load_sample_image(f"{name}.jpg") for name in PHOTOGRAPHS[4:]]
    scaled = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0 for image in images]
    return [torch.nn.functional.avg_pool2d(image, 2) for image in scaled]


def draw_patches(
    images: list[torch.Tensor], size: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``size`` random patches, mirrored half of the time: float32 [size, 3, 32, 32] and labels int64 [size]."""

    def below(bound: int) -> int:
        return int(torch.randint(bound, (), generator=generator))

    labels = torch.randint(len(images), (size,), generator=generator)
    patches = []
    for label in labels.tolist():
        _, height, width = images[label].shape
        top, left = below(height - PATCH + 1), below(width - PATCH + 1)
        patch = images[label][:, top : top + PATCH, left : left + PATCH]
        patches.append(patch.flip(-1) if torch.rand((), generator=generator) < 0.5 else patch)
    return torch.stack(patches), labels


class Images(Dataset):
    """Images float32 [channels, height, width] in [-1, 1] with the index of their class."""

    num_classes: int
    fingerprint: str
    """What a checkpoint remembers the data by."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        raise NotImplementedError

    def check(self, rows: Sequence[int]) -> None:
        """Raise a ValueError if one of these cannot be read."""


class Digits(Images):
    """scikit-learn's 1797 digits, [1, 8, 8]."""

    num_classes, fingerprint = 10, "digits"

    def __init__(self) -> None:
        from free.data.digits import digits_data

        self.images, self.labels = digits_data()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.images[row], int(self.labels[row])


class Photos(Images):
    """Random patches of the photographs, [3, 32, 32], the same at every reading of a row; a class is a photograph."""

    num_classes, fingerprint = len(PHOTOGRAPHS), "photos"

    def __init__(self) -> None:
        self.images = photographs()

    def __len__(self) -> int:
        return _PATCHES

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        patches, labels = draw_patches(self.images, 1, torch.Generator().manual_seed(row))
        return patches[0], int(labels[0])


class ImageFolder(Images):
    """A folder with a sub-folder of images for each class; the class is the place among the sorted names.

    An image is scaled until its shorter side is the resolution, and its middle square cropped.

    Args:
        folder: the root.
        resolution: pixels a side.
        channels: 3 for colour, 1 for grey.
        skip_unreadable: leave out files that cannot be read, instead of an error that names them.

    Raises:
        FileNotFoundError: the folder is not there.
        ValueError: no sub-folders, or one without images.
    """

    def __init__(self, folder: str | Path, resolution: int, channels: int = 3, skip_unreadable: bool = False) -> None:
        from PIL import Image

        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"train_data_dir is {str(folder)!r}, which is not a folder")
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        if not classes:
            raise ValueError(f"train_data_dir {str(folder)!r} holds no sub-folders; allowed is one of images for each class")
        known = Image.registered_extensions()
        self.files: list[tuple[Path, int]] = []
        for label, path in enumerate(classes):
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in known and file.is_file())
            if not found:
                raise ValueError(f"class folder {str(path)!r} holds no images")
            self.files += [(file, label) for file in found]
        self.num_classes = len(classes)
        self.fingerprint = f"{len(self.files)} images of {', '.join(path.name for path in classes)}"
        self.resolution, self.mode, self.skip_unreadable = resolution, {1: "L", 3: "RGB"}[channels], skip_unreadable

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        file, label = self.files[row]
        try:
            return self._read(file), label
        except (OSError, SyntaxError) as error:  # what Pillow raises of broken files
            if self.skip_unreadable:
                return self[(row + 1) % len(self)]
            raise ValueError(f"image {str(file)!r} cannot be read: {error}") from error

    def check(self, rows: Sequence[int]) -> None:
        """Open these files, which reads no pixels; what is broken further on is found as it is reached.

        Raises:
            ValueError: some cannot be read and are not to be skipped, or none can.
        """
        unreadable = [file for file, _ in (self.files[row] for row in rows) if not _opens(file)]
        if unreadable and not (self.skip_unreadable and len(unreadable) < len(rows)):
            names = ", ".join(repr(str(file)) for file in unreadable[:_NAMED])
            more = " …" if len(unreadable) > _NAMED else ""
            raise ValueError(f"{len(unreadable)} of {len(rows)} images cannot be read: {names}{more}; see skip_unreadable")

    def _read(self, file: Path) -> torch.Tensor:
        from PIL import Image

        with Image.open(file) as opened:
            image = opened.convert(self.mode)
        scale = self.resolution / min(image.size)
        width, height = (max(self.resolution, round(side * scale)) for side in image.size)
        left, top = (width - self.resolution) // 2, (height - self.resolution) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        pixels = torch.from_numpy(np.array(image)).view(self.resolution, self.resolution, -1)
        return pixels.permute(2, 0, 1).float() / 127.5 - 1.0  # [channels, resolution, resolution]


def _opens(file: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(file):
            return True
    except (OSError, SyntaxError):
        return False


class Rows:
    """The rows of every batch: one shuffled pass after the other, split over the processes.

    A pure function of the seed and the batch's number, so that a run is taken up again anywhere.
    """

    def __init__(self, count: int, batch_size: int, seed: int, first: int = 0, process: int = 0, processes: int = 1) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.first, self.process, self.processes = first, process, processes

    def __iter__(self) -> Iterator[list[int]]:
        batch, number, order = self.first, -1, np.arange(0)
        while True:
            begin = (batch * self.processes + self.process) * self.batch_size
            rows = []
            for place in range(begin, begin + self.batch_size):
                if place // self.count != number:
                    number = place // self.count
                    order = np.random.default_rng((self.seed, number)).permutation(self.count)
                rows.append(int(order[place % self.count]))
            yield rows
            batch += 1


class LatentData:
    """Batches of latents and labels for one target.

    Args:
        images: the set.
        sample_shape: of the target's samples.
        null_class: of the target, one more than its last class.
        vae: encodes the images; None leaves them as they are.
        subset: share of the set that is used, drawn with ``seed``.
        seed: of the subset.

    Raises:
        ValueError: the images or their classes do not fit the target, or cannot be read.
    """

    def __init__(
        self,
        images: Images,
        sample_shape: Sequence[int],
        null_class: int,
        *,
        vae: Any = None,
        subset: float = 1.0,
        seed: int = 0,
    ) -> None:
        if images.num_classes > null_class:
            raise ValueError(f"the data has {images.num_classes} classes; the model has {null_class}")
        order = np.random.default_rng(seed).permutation(len(images))
        rows = order[: max(1, round(subset * len(images)))].tolist()
        images.check(rows)
        self.images, self.vae, self.fingerprint = Subset(images, rows), vae, images.fingerprint
        shape = tuple(images[rows[0]][0].shape)
        if vae is not None:
            factor = vae_factor(vae)
            shape = (vae.config.latent_channels, shape[1] // factor, shape[2] // factor)
        if shape != tuple(sample_shape):
            raise ValueError(f"the data's samples have shape {shape}; the model's have {tuple(sample_shape)}")

    def batches(
        self, batch_size: int, seed: int, *, first: int = 0, process: int = 0, processes: int = 1, num_workers: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless batches of images [n, channels, height, width] and labels int64 [n], on the CPU, from number ``first`` on;
        ``seed`` is of their order.
        """
        rows = Rows(len(self.images), batch_size, seed, first, process, processes)
        return iter(
            DataLoader(
                self.images,
                batch_sampler=rows,
                num_workers=num_workers,
                generator=torch.Generator(),  # a loader draws a seed, which must not come out of the run's random state
                pin_memory=torch.cuda.is_available(),
            )
        )

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents float32 [n, *sample shape] of images; drawn from what the VAE says, scaled as it was trained."""
        if self.vae is None:
            return images
        latents = self.vae.encode(images.to(self.vae.dtype)).latent_dist.sample()
        return latents.float() * self.vae.config.scaling_factor


def vae_factor(vae: Any) -> int:
    """Pixels a latent, each way, of an ``AutoencoderKL``."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def open_images(
    sample_shape: Sequence[int],
    *,
    dataset: str | None = None,
    train_data_dir: str | Path | None = None,
    resolution: int | None = None,
    vae: Any = None,
    skip_unreadable: bool = False,
) -> Images:
    """A built-in set or an image folder.

    Args:
        sample_shape: of the target's samples, [channels, size, size].
        dataset: of :data:`BUILT_IN`.
        train_data_dir: see :class:`ImageFolder`.
        resolution: pixels a side; what the target (and the VAE) ask for if left out.
        vae: an ``AutoencoderKL`` that will encode the images.

    Raises:
        ValueError: both or neither of the two, or a resolution that does not fit.
    """
    if (dataset is None) == (train_data_dir is None):
        raise ValueError(f"dataset is {dataset!r} and train_data_dir is {train_data_dir!r}; give one of them")
    if dataset is not None:
        if dataset not in BUILT_IN:
            raise ValueError(f"dataset is {dataset!r}; allowed are {', '.join(map(repr, BUILT_IN))}")
        return Digits() if dataset == "digits" else Photos()
    assert train_data_dir is not None
    channels, size = sample_shape[0], sample_shape[-1]
    fitting = size * (1 if vae is None else vae_factor(vae))
    if resolution not in (None, fitting):
        raise ValueError(f"resolution is {resolution}; the model's samples of {size} a side need {fitting}")
    if vae is None and channels not in (1, 3):
        raise ValueError(f"the model's samples have {channels} channels, which are no pixels; give vae")
    return ImageFolder(train_data_dir, fitting, 3 if vae is not None else channels, skip_unreadable)
