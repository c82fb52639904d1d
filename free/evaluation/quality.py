"""How far samples are from real data: two distances, neither of which a classifier's accuracy could stand in for.

Accuracy rises as samples lose variety, so it is not asked for. The energy distance looks at the samples' own numbers, all of
them, so noise that was left or detail that was lost shows in it. The Fréchet distance looks at the hidden layer of a small
network that learned to tell the data's classes apart, so it weighs what makes an image one of its class. The usual Inception
features were made for photographs of other sizes, and would be a dependency of hundreds of megabytes.
"""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from free.sampling.statistics import standard_error

HIDDEN_UNITS = 64
_EPOCHS = 100
_BLOCKS = 10
_ROWS = 4096  # of distances that are in memory at once


@dataclass(frozen=True)
class Quality:
    """Distances of N samples from real data, each with the standard error that N samples leave."""

    energy_distance: float
    """(2 E|x - y| - E|x - x'| - E|y - y'|) / E|y - y'| over the samples x and the data y, without bias: about 0 for real
    ones, or less."""
    energy_error: float
    frechet_distance: float
    """|difference of the means|² + tr(C1 + C2 - 2 sqrt(C1 C2)) of the features, over the trace of the data's covariance;
    biased upwards, the more, the fewer samples there are."""
    frechet_error: float
    frechet_floor: float
    """The same of as many real images that were kept apart (of all that were, if they are fewer)."""


class Judge:
    """Real images, half of them the reference and half kept apart, and the network that was trained on the reference.

    Args:
        images: float [N, *sample shape], as the model makes them; at least 4 of each class.
        labels: int [N], two classes or more.

    Raises:
        ValueError: images and labels that do not go together, are not finite or are too few.
        ImportError: scikit-learn is not installed.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        if images.dim() < 2 or labels.shape != images.shape[:1] or not images.is_floating_point():
            raise ValueError(
                f"data has images of shape {tuple(images.shape)} and dtype {images.dtype}, and labels of shape "
                f"{tuple(labels.shape)}; allowed are floating images (N, *sample shape) and labels (N,)"
            )
        if not torch.isfinite(images).all():
            raise ValueError("data holds NaN or infinity; allowed are finite images")
        classes, counts = labels.unique(return_counts=True)
        if len(classes) < 2 or int(counts.min()) < 4:
            raise ValueError(
                f"data has {len(classes)} classes, of {counts.tolist()} images; allowed are 2 or more, of 4 each"
            )
        try:
            from sklearn.neural_network import MLPClassifier
        except ImportError as error:
            raise ImportError("the quality measure needs scikit-learn: pip install 'free-dit[demo]'") from error
        self.sample_shape = tuple(images.shape[1:])
        digest = hashlib.sha256(images.float().contiguous().numpy().tobytes() + labels.long().contiguous().numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        """Of the data."""

        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(images), generator=generator)
        order = order[labels[order].argsort(stable=True)]  # so that both halves have as many of each class
        apart = order[1::2]
        flat = images.float().flatten(1)
        self.reference = flat[order[0::2]]  # [N/2, D]
        self.apart = flat[apart[torch.randperm(len(apart), generator=generator)]]  # [N/2, D]
        self.spread = _mean_distance(self.reference, self.reference, apart=True).mean()
        self.network = MLPClassifier((HIDDEN_UNITS,), max_iter=_EPOCHS, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it might be trained for longer
            self.network.fit(self.reference.numpy(), labels[order[0::2]].numpy())
        self.scale = np.sqrt(self._hidden(self.reference).var(0, ddof=1).sum())
        self.moments = _moments(self.features(self.reference))

    def features(self, flat: torch.Tensor) -> np.ndarray:
        """The hidden layer of the network for flattened images [N, D], scaled to a total variance of 1 over the reference;
        float64 [N, HIDDEN_UNITS].
        """
        return self._hidden(flat) / self.scale

    def __call__(self, samples: torch.Tensor) -> Quality:
        """Judge N samples [N, *sample shape], N at least 3, whose classes take turns.

        Raises:
            ValueError: samples of another shape, or too few.
        """
        if tuple(samples.shape[1:]) != self.sample_shape or len(samples) < 3:
            raise ValueError(f"samples have shape {tuple(samples.shape)}; allowed is (3 or more, {self.sample_shape})")
        flat = samples.detach().cpu().float().flatten(1)
        across, within = _mean_distance(flat, self.reference), _mean_distance(flat, flat, apart=True)  # [N]
        energy = (2 * across.mean() - within.mean() - self.spread) / self.spread
        influence = 2 * (across - within) / self.spread  # of each sample, so that their spread gives the standard error
        features = self.features(flat)
        return Quality(
            float(energy),
            standard_error(np.array([block.mean() for block in _blocks(influence.double().numpy())])),
            frechet_distance(_moments(features), self.moments),
            self._frechet_error(features),
            frechet_distance(_moments(self.features(self.apart[: len(flat)])), self.moments),
        )

    def _hidden(self, flat: torch.Tensor) -> np.ndarray:
        return np.maximum(flat.double().numpy() @ self.network.coefs_[0] + self.network.intercepts_[0], 0)

    def _frechet_error(self, features: np.ndarray) -> float:
        """By the jackknife, a block at a time left out: a bootstrap's repeated rows would add to so biased a distance."""
        rows = np.arange(len(features))
        without = np.array(
            [frechet_distance(_moments(np.delete(features, block, 0)), self.moments) for block in _blocks(rows)]
        )
        return float(np.sqrt((len(without) - 1) * without.var()))


def _blocks(values: np.ndarray) -> list[np.ndarray]:
    """In the order of the samples, in which the classes take turns: a block has all of them, as the whole has."""
    return np.array_split(values, min(_BLOCKS, len(values)))


def load_data(word: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels: ``"digits"``, scikit-learn's (which the package's own DiT was trained on), or a ``.npz`` file of
    ``images`` and ``labels``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another file, or one that lacks either array.
    """
    if word == "digits":
        from free.data.digits import digits_data

        return digits_data()
    path = Path(word)
    if path.suffix != ".npz":
        raise ValueError(f"data is {word!r}; allowed are 'digits' or a .npz file of images and labels")
    if not path.is_file():
        raise FileNotFoundError(f"data is {word!r}, which is not there")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"images", "labels"} - set(arrays.files)
            if not missing:
                return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        # NumPy's own words on arrays of objects suggest to load them unsafely
        raise ValueError(f"data is {word!r}, which is no .npz of numbers; allowed are images and labels") from error
    raise ValueError(f"data in {word!r} lacks {', '.join(sorted(missing))}")


def frechet_distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians, each a mean [F] and a covariance [F, F]."""
    (mean, covariance), (other_mean, other_covariance) = first, second
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    # the trace of sqrt(C1 C2), whose eigenvalues are those of a symmetric matrix
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other_covariance @ root), 0)).sum()
    return float(((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * cross)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(0), np.cov(features, rowvar=False)


def _mean_distance(first: torch.Tensor, second: torch.Tensor, apart: bool = False) -> torch.Tensor:
    """Of each row of ``first`` [N, D] to those of ``second`` [M, D] (with ``apart`` to the others of itself): [N]."""
    total = torch.cat([torch.cdist(rows, second).double().sum(1) for rows in first.split(_ROWS)])
    return total / (len(second) - apart)
