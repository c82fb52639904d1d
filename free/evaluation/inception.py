"""torch-fidelity's Inception, the features that the FID is of; all that is known of that library is here."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from free.data.archives import StoredImages

NEIGHBOURS = 3
"""Of precision and recall (Kynkäänniemi et al. 2019)."""
_CHUNK = 2048


class Inception:
    """torch-fidelity's Inception, with weights from a file.

    Raises:
        ImportError: torch-fidelity, or the torchvision that belongs to torch, is not there.
        ValueError: the file holds something else.
        FileNotFoundError: it is not there.
    """

    def __init__(self, weights: Path, device: str) -> None:
        try:
            import torch_fidelity
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises the latter
            raise ImportError(
                f"Inception's features need torch-fidelity, and the torchvision of torch {torch.__version__} ({error}): "
                "pip install 'free-dit[evaluate]'"
            ) from error
        if not weights.is_file():
            raise FileNotFoundError(f"weights is {str(weights)!r}, which is not there")
        try:
            torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would run what a pickle holds
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
            )
        except (RuntimeError, ValueError, KeyError, EOFError, AttributeError, TypeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"weights in {str(weights)!r} are not torch-fidelity's Inception: {reason}") from error
        self.network, self.device = network.to(device), device
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
        self.name = f"Inception, {weights.name} (sha256 {digest}), torch-fidelity {torch_fidelity.__version__}"

    def compare(
        self, samples: StoredImages, reference: StoredImages, batch_size: int, progress: bool
    ) -> tuple[float, tuple[float, float] | None]:
        """The Fréchet inception distance, and precision and recall where both are images.

        Raises:
            ValueError: statistics of other features, or too few images.
        """
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
        from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

        both = (samples, reference)
        for images in both:
            if images.statistics is None and images.count <= NEIGHBOURS:
                raise ValueError(f"{str(images.path)!r} has {images.count} images; {NEIGHBOURS + 1} or more are needed")
        with tqdm(total=sum(images.count for images in both), disable=not progress, unit="image") as bar:
            features = [self._features(images.batches(batch_size), bar) if images.count else None for images in both]
        first, second = (self._statistics(images, rows) for images, rows in zip(both, features, strict=True))
        shapes = [(one["mu"].shape, one["sigma"].shape) for one in (first, second)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"statistics mu and sigma of shapes {shapes[0]} and {shapes[1]}; Inception has 2048 features")
        distance = float(fid_statistics_to_metric(first, second, False)[KEY_METRIC_FID])
        if features[0] is None or features[1] is None:
            return distance, None
        options: dict[str, Any] = {"prc_neighborhood": NEIGHBOURS, "save_cpu_ram": True, "verbose": False}
        shares = prc_features_to_metric(features[0], features[1], prc_batch_size=_CHUNK, **options)
        return distance, (shares[KEY_METRIC_PRECISION], shares[KEY_METRIC_RECALL])

    def _statistics(self, images: StoredImages, features: torch.Tensor | None) -> dict[str, np.ndarray]:
        from torch_fidelity.metric_fid import fid_features_to_statistics

        stored = images.statistics
        if stored is not None:
            return stored
        assert features is not None  # there are images where there are no statistics
        return dict(fid_features_to_statistics(features.double()))

    @torch.no_grad()
    def _features(self, batches: Iterable[np.ndarray], bar: Any) -> torch.Tensor:
        """float32 [N, 2048] on the CPU; grey images are shown as three equal channels."""
        rows = []
        for images in batches:
            pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2)
            shown = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
            rows.append(self.network(shown.contiguous().to(self.device))[0].cpu())
            bar.update(len(images))
        return torch.cat(rows)
