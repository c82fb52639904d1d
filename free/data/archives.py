"""Folders and ``.npz`` files of images, as measures of image models exchange them, a few rows at a time.

``arr_0`` is uint8 [N, height, width, channels], ``arr_1`` the labels, int64 [N], where there are any. Fifty thousand samples
of 256 pixels a side are 10 GB, which need not be in memory.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

_EPOCH = (1980, 1, 1, 0, 0, 0)  # so that equal images make equal files


IMAGES = (".png", ".jpg", ".jpeg")


def write_images(path: Path, images: Iterable[np.ndarray], shape: Sequence[int], labels: np.ndarray | None = None) -> None:
    """Write ``images``, uint8 [n, height, width, channels] a part, as a ``.npz`` file.

    Args:
        path: of the file.
        images: the parts, in order.
        shape: of all of them together, (N, height, width, channels).
        labels: int64 [N], or None.

    Raises:
        OSError: it cannot be written.
        ValueError: the parts do not make up the shape.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy", _EPOCH), "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(cast(Any, file), header)
            rows = 0
            for part in images:
                if part.dtype != np.uint8 or part.shape[1:] != tuple(shape[1:]):
                    raise ValueError(f"images of {part.dtype} {part.shape[1:]}; the others are uint8 {tuple(shape[1:])}")
                file.write(np.ascontiguousarray(part).data)
                rows += len(part)
            if rows != shape[0]:
                raise ValueError(f"{rows} images; {shape[0]} were promised")
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy", _EPOCH), "w") as file:
                np.lib.format.write_array(file, labels.astype(np.int64), allow_pickle=False)


class ImageArchive:
    """A ``.npz`` file of images, ``arr_0``, or of statistics of features, ``mu`` and ``sigma``, or of both.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no ``.npz`` of numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"no file {str(path)!r}")
        try:
            with zipfile.ZipFile(path) as archive:
                self.names = [name.removesuffix(".npy") for name in archive.namelist()]
            header: tuple[tuple[int, ...], Any, bool] = ((), None, False)
            self.shape, self._dtype, self._fortran = self._header("arr_0") if "arr_0" in self.names else header
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise ValueError(f"{str(path)!r} is no .npz of numbers: {error}") from error
        if "arr_0" in self.names and (len(self.shape) != 4 or self._dtype != np.uint8 or self._fortran):
            raise ValueError(
                f"arr_0 of {str(path)!r} is {self._dtype} of shape {self.shape}; allowed is uint8 (N, height, width, "
                "channels)"
            )

    def array(self, name: str) -> np.ndarray:
        """A small array, such as ``mu``, ``sigma`` or ``arr_1``; a ValueError if it is not there or no numbers."""
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                return np.asarray(arrays[name])
        except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{str(self.path)!r} holds no array {name!r} of numbers") from error

    def images(self, rows: int) -> Iterator[np.ndarray]:
        """The images in order, uint8 [``rows`` or fewer, height, width, channels] a part.

        Raises:
            ValueError: there are fewer than the file says.
        """
        image = self.shape[1:]
        size = int(np.prod(image))
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _read_header(file)
            for first in range(0, self.shape[0], rows):
                count = min(rows, self.shape[0] - first)
                try:
                    content = file.read(count * size)
                except (zipfile.BadZipFile, EOFError, OSError) as error:
                    raise ValueError(f"{str(self.path)!r} cannot be read to its end: {error}") from error
                if len(content) != count * size:
                    raise ValueError(f"{str(self.path)!r} ends within its images")
                yield np.frombuffer(content, np.uint8).reshape(count, *image)

    def _header(self, name: str) -> tuple[tuple[int, ...], Any, bool]:
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
            return _read_header(file)


def _read_header(file: Any) -> tuple[tuple[int, ...], Any, bool]:
    """Shape, dtype and order of an array in NumPy's format; what follows in the file are its numbers."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, dtype, fortran


class StoredImages:
    """Images in a folder or an archive, read a batch at a time."""

    def __init__(self, path: Path, files: list[Path], archive: ImageArchive | None) -> None:
        self.path, self.files, self.archive = path, files, archive
        self.count = len(files) if archive is None else (archive.shape or (0,))[0]

    @classmethod
    def of(cls, word: str | Path) -> StoredImages:
        path = Path(word)
        if path.suffix == ".npz":
            archive = ImageArchive(path)
            if "arr_0" not in archive.names and not {"mu", "sigma"} <= set(archive.names):
                raise ValueError(
                    f"{str(path)!r} holds {archive.names}; allowed are arr_0 (images), or mu and sigma (statistics)"
                )
            return cls(path, [], archive)
        if not path.is_dir():
            raise FileNotFoundError(f"{str(path)!r} is not there; allowed are a folder of images or a .npz file")
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES)
        if not files:
            raise ValueError(f"{str(path)!r} holds no images ({', '.join(IMAGES)})")
        wanted = _promised(path)
        if wanted not in (None, len(files)):
            raise ValueError(
                f"{str(path)!r} has {len(files)} of {wanted} samples: run the same `free-dit sample` command again to "
                "finish it"
            )
        return cls(path, files, None)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """uint8 [n, height, width, channels]."""
        if self.archive is not None:
            yield from self.archive.images(size)
            return
        shape = None
        for first in range(0, self.count, size):
            images = [_read(file) for file in self.files[first : first + size]]
            shape = images[0].shape if shape is None else shape
            for file, image in zip(self.files[first:], images, strict=False):
                if image.shape != shape:
                    raise ValueError(f"{str(file)!r} is an image of shape {image.shape}; the others are {shape}")
            yield np.stack(images)

    @property
    def statistics(self) -> dict[str, np.ndarray] | None:
        """``mu`` and ``sigma``, float64, where they are stored."""
        if self.archive is None or not {"mu", "sigma"} <= set(self.archive.names):
            return None
        return {name: self.archive.array(name).astype(np.float64) for name in ("mu", "sigma")}


def _promised(folder: Path) -> int | None:
    """How many samples a folder of ``free-dit sample`` should have; None of another folder."""
    try:
        return int(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["configuration"]["num_samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(file: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return np.atleast_3d(np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB")))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"image {str(file)!r} cannot be read: {error}") from error
