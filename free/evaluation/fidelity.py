"""``free-dit evaluate``: Fréchet distance, precision and recall of samples against other images or stored statistics.

The usual features are Inception's, by torch-fidelity, whose weights the caller has to have: then the distance is the FID.
Without them the features are those of the small network that :mod:`free.evaluation.quality` trains on the labelled
reference, and the distance is no FID and is never called so: it compares samplers of one data set with each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from free.checks import check_count
from free.data.archives import ImageArchive, StoredImages
from free.evaluation.inception import NEIGHBOURS, Inception
from free.evaluation.quality import Judge, load_data
from free.targets.loading import default_device

SMALL = "small network (no FID)"
_CHUNK = 2048


@dataclass(frozen=True)
class Fidelity:
    """How far samples are from a reference; None where nothing can be said."""

    features: str
    """Whose the distances are of."""
    samples: int
    reference: int | None
    """Images; None where statistics are all there is."""
    frechet_distance: float
    """Of Inception's features the FID; of the small network's over the trace of the reference's covariance, as in
    :class:`free.evaluation.quality.Quality`."""
    precision: float | None
    """Share of samples that look like one of the reference."""
    recall: float | None
    """Share of the reference that looks like one of the samples."""
    frechet_floor: float | None = None
    """What the small network says of as many images of the reference that were kept apart."""
    energy_distance: float | None = None
    """Of the pixels, as there."""

    def __str__(self) -> str:
        name = "Fréchet distance" if self.features.startswith(SMALL) else "FID"
        rows: list[tuple[str, str]] = [
            ("features", self.features),
            (
                "images",
                f"{self.samples} samples, " + (f"{self.reference} of the reference" if self.reference else "statistics"),
            ),
            (name, f"{self.frechet_distance:.4g}"),
        ]
        if self.frechet_floor is not None:
            rows.append((f"{name} of real images", f"{self.frechet_floor:.4g}"))
        if self.energy_distance is not None:
            rows.append(("energy distance of pixels", f"{self.energy_distance:.4g}"))
        if self.precision is not None and self.recall is not None:
            rows += [("precision", f"{self.precision:.4f}"), ("recall", f"{self.recall:.4f}")]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def evaluate(
    samples: str | Path,
    reference: str | Path,
    *,
    weights: str | Path | None = None,
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = False,
) -> Fidelity:
    """Compare samples with a reference.

    Args:
        samples: a folder of images (and of folders of images), or a ``.npz`` of ``arr_0``, uint8 [N, height, width,
            channels]. With ``weights`` also a ``.npz`` of ``mu`` and ``sigma``.
        reference: the same. Without ``weights`` it needs labels: ``"digits"``, a ``.npz`` of ``images`` and ``labels`` as
            :func:`free.evaluation.quality.load_data` takes it, or of ``arr_0`` and ``arr_1``.
        weights: torch-fidelity's Inception file (``weights-inception-2015-12-05-6726825d.pth``).
        batch_size: images that Inception sees at once.
        device: Inception's; left out, the GPU if there is one.
        progress: show a bar that counts images.

    Raises:
        OSError: a path that is not there.
        ValueError: a file that holds something else, images that differ in shape, or an unfinished folder of samples.
        ImportError: an extra that is not installed, named.
    """
    batch_size = check_count("batch_size", batch_size)
    if weights is not None:
        # first of all: what is missing should not come out after hours
        inception = Inception(Path(weights), default_device() if device is None else device)
        ours, theirs = StoredImages.of(samples), StoredImages.of(reference)
        distance, shares = inception.compare(ours, theirs, batch_size, progress)
        precision, recall = shares or (None, None)
        return Fidelity(inception.name, ours.count, theirs.count or None, distance, precision, recall)
    if device is not None:
        raise ValueError(f"device is {device!r}, which is Inception's; give weights too, or leave it out")
    images, labels = _labelled(str(reference))
    ours = StoredImages.of(samples)
    if not ours.count:
        raise ValueError(f"{str(samples)!r} holds statistics and no images: what they are of is not known; give weights too")
    judge = Judge(images, labels)
    drawn = torch.cat([_as_samples(part) for part in ours.batches(batch_size)])
    quality = judge(drawn)
    features = torch.from_numpy(judge.features(drawn.flatten(1)))
    precision, recall = precision_recall(features, torch.from_numpy(judge.features(judge.reference)))
    return Fidelity(
        f"{SMALL}, trained on {reference}",
        len(drawn),
        len(judge.reference),
        quality.frechet_distance,
        precision,
        recall,
        quality.frechet_floor,
        quality.energy_distance,
    )


def precision_recall(samples: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Precision and recall of features [N, F] and [M, F] (Kynkäänniemi et al. 2019): a point is covered that is as near to
    one of the others as that one's third neighbour. A ValueError of too few.
    """
    for name, rows in {"samples": samples, "reference": reference}.items():
        if len(rows) <= NEIGHBOURS:
            raise ValueError(f"{name} has {len(rows)} images; precision and recall need {NEIGHBOURS + 1} or more")
    return _covered(samples, reference), _covered(reference, samples)


def _covered(points: torch.Tensor, others: torch.Tensor) -> float:
    """Share of the points that lie as near to one of the others as its third neighbour does."""
    radius = torch.cat([torch.cdist(part, others).kthvalue(NEIGHBOURS + 1).values for part in others.split(_CHUNK)])
    inside = [(torch.cdist(part, others) <= radius).any(1) for part in points.split(_CHUNK)]
    return float(torch.cat(inside).double().mean())


def _as_samples(images: np.ndarray) -> torch.Tensor:
    """As a model of pixels makes them: float32 [n, channels, height, width] in [-1, 1]."""
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _labelled(word: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A reference's images and labels, which the small network learns from."""
    path = Path(word)
    if path.suffix == ".npz" and path.is_file():
        archive = ImageArchive(path)
        if {"arr_0", "arr_1"} <= set(archive.names):
            parts = [_as_samples(part) for part in archive.images(_CHUNK)]
            return torch.cat(parts), torch.from_numpy(archive.array("arr_1"))
    if path.is_dir():
        raise ValueError(
            f"reference {word!r} has no labels, which the small network learns from; give weights, or a .npz of them"
        )
    return load_data(word)
