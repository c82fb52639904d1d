"""``free-dit evaluate``: own features, torch-fidelity's, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from free.cli import main
from free.data.archives import write_images
from free.data.digits import digits_data
from free.evaluation import evaluate
from free.evaluation.fidelity import precision_recall
from free.evaluation.quality import frechet_distance


def pixels_of(images: torch.Tensor) -> np.ndarray:
    return (images / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, np.ndarray]:
    images, labels = digits_data()
    return pixels_of(images), labels.numpy()


def archive(path: Path, images: np.ndarray, labels: np.ndarray | None = None) -> Path:
    write_images(path, [images], images.shape, labels)
    return path


def folder(path: Path, images: np.ndarray) -> Path:
    for i, image in enumerate(images):
        file = path / f"{i // 10:02}" / f"{i:06}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(file)
    return path


def test_small_features_tell_real_from_blurred_and_from_few(
    real: tuple[np.ndarray, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = real
    blurred = (images.astype(float) * 0.5 + images.mean(0) * 0.5).astype(np.uint8)
    found = {
        name: evaluate(archive(tmp_path / f"{name}.npz", rows), "digits")
        for name, rows in {"real": images[:600], "blurred": blurred[:600], "one class": images[labels == 3]}.items()
    }
    assert found["real"].frechet_distance < 0.05
    assert found["blurred"].frechet_distance > 0.2
    assert found["one class"].frechet_distance > 0.2
    assert found["real"].precision > 0.95
    assert found["real"].recall > 0.8
    assert found["one class"].precision > 0.9
    assert found["one class"].recall < 0.3
    assert (found["real"].samples, found["real"].reference) == (600, 899)
    assert main(["evaluate", str(folder(tmp_path / "png", images[:600])), "digits"]) == 0
    printed = capsys.readouterr().out
    assert "FID  " not in printed
    assert "small network (no FID), trained on digits" in printed
    assert f"Fréchet distance                 {found['real'].frechet_distance:.4g}\n" in printed
    labelled = archive(tmp_path / "labelled.npz", images, labels)
    assert evaluate(folder(tmp_path / "png", images[:600]), labelled).precision == pytest.approx(
        found["real"].precision, abs=0.02
    )


def test_precision_and_recall_are_by_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(30, 4, generator=generator), 0.5 * torch.randn(40, 4, generator=generator) + 1

    def covered(points: torch.Tensor, others: torch.Tensor) -> float:
        hits = 0
        for point in points:
            hits += any(
                (point - other).norm() <= (others - other).norm(dim=1).sort().values[3] for other in others
            )  # the first is itself
        return hits / len(points)

    assert precision_recall(first, second) == pytest.approx((covered(first, second), covered(second, first)))
    with pytest.raises(ValueError, match="samples has 3 images; precision and recall need 4 or more"):
        precision_recall(first[:3], second)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nothing", "is not there; allowed are a folder of images or a .npz file"),
        ("empty", "holds no images"),
        ("unlabelled", "has no labels, which the small network learns from; give weights"),
        ("statistics", "holds statistics and no images"),
        ("other arrays", "allowed are arr_0 (images), or mu and sigma (statistics)"),
        ("sizes", "is an image of shape (4, 4, 1); the others are (8, 8, 1)"),
        ("broken", "cannot be read"),
        ("unfinished", "has 6 of 50 samples: run the same `free-dit sample` command again"),
        ("shape", "samples have shape (6, 1, 4, 4); allowed is (3 or more, (1, 8, 8))"),
    ],
)
def test_what_cannot_be_compared(
    case: str, message: str, real: tuple[np.ndarray, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, reference = tmp_path / "png", "digits"
    images = real[0][:6]
    if case == "empty":
        samples.mkdir()
    elif case == "statistics":
        samples = tmp_path / "s.npz"
        np.savez(samples, mu=np.zeros(3), sigma=np.eye(3))
    elif case == "other arrays":
        samples = tmp_path / "s.npz"
        np.savez(samples, images=np.zeros(3))
    elif case != "nothing":
        folder(samples, images[:, :4, :4] if case == "shape" else images)
    if case == "unlabelled":
        reference = str(samples)
    if case == "sizes":
        Image.fromarray(images[0, :4, :4, 0]).save(samples / "00" / "000004.png")
    if case == "broken":
        (samples / "00" / "000004.png").write_bytes(b"no image")
    if case == "unfinished":
        (samples / "manifest.json").write_text(json.dumps({"configuration": {"num_samples": 50}}))
    assert main(["evaluate", str(samples), reference]) == 1
    assert message in capsys.readouterr().err


def test_without_torch_fidelity_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert main(["evaluate", str(tmp_path), "digits", "--weights", "w.pth"]) == 1
    assert "pip install 'free-dit[evaluate]'" in capsys.readouterr().err


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch-fidelity as far as it is used, with features that are a mean of the pixels; what it was asked is recorded."""
    asked: dict[str, Any] = {"batches": []}

    class Extractor(torch.nn.Module):
        def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            asked["made"] = (name, features)
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            assert images.dtype == torch.uint8
            asked["batches"].append(tuple(images.shape))
            return (images.float().mean(-1).flatten(1)[:, :5] / 255,)

    def statistics(features: torch.Tensor) -> dict[str, np.ndarray]:
        assert features.dtype == torch.float64  # stored statistics are, and torch-fidelity wants both alike
        return {"mu": features.numpy().mean(0), "sigma": np.cov(features.numpy(), rowvar=False)}

    def distance(first: dict[str, np.ndarray], second: dict[str, np.ndarray], verbose: bool) -> dict[str, float]:
        return {"fid": frechet_distance((first["mu"], first["sigma"]), (second["mu"], second["sigma"]))}

    def shares(first: torch.Tensor, second: torch.Tensor, **options: Any) -> dict[str, float]:
        asked["shares"] = options
        precision, recall = precision_recall(first, second)
        return {"p": precision, "r": recall}

    contents = {
        "torch_fidelity": {"__version__": "0.4.0"},
        "torch_fidelity.feature_extractor_inceptionv3": {"FeatureExtractorInceptionV3": Extractor},
        "torch_fidelity.metric_fid": {
            "KEY_METRIC_FID": "fid", "fid_features_to_statistics": statistics, "fid_statistics_to_metric": distance,
        },
        "torch_fidelity.metric_prc": {
            "KEY_METRIC_PRECISION": "p", "KEY_METRIC_RECALL": "r", "prc_features_to_metric": shares,
        },
    }  # fmt: skip
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_inception_sees_colours_in_batches_and_statistics_are_taken_as_stored(
    real: tuple[np.ndarray, np.ndarray], tmp_path: Path, stand_in: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    images, _ = real
    weights = tmp_path / "inception.pth"
    torch.save({}, weights)
    samples, reference = archive(tmp_path / "a.npz", images[:50]), folder(tmp_path / "b", images[50:110])
    found = evaluate(samples, reference, weights=weights, batch_size=32, device="cpu")
    assert stand_in["made"] == ("inception-v3-compat", ["2048"])
    assert stand_in["batches"] == [(32, 3, 8, 8), (18, 3, 8, 8), (32, 3, 8, 8), (28, 3, 8, 8)]
    assert stand_in["shares"]["prc_neighborhood"] == 3
    assert 0 < found.precision <= 1
    assert found.frechet_distance > 0
    assert "inception.pth" in found.features
    assert "FID" in str(found)

    rows = (images[50:110].astype(np.float64).mean(2) / 255).transpose(0, 2, 1).reshape(60, -1)  # of three equal channels
    rows = np.tile(rows, 3)[:, :5]
    np.savez(tmp_path / "s.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    stored = evaluate(samples, tmp_path / "s.npz", weights=weights, device="cpu")
    assert stored.frechet_distance == pytest.approx(found.frechet_distance, abs=1e-6)
    assert stored.precision is None
    np.savez(tmp_path / "t.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match="statistics mu and sigma of shapes"):
        evaluate(samples, tmp_path / "t.npz", weights=weights, device="cpu")
    with pytest.raises(ValueError, match="has 3 images; 4 or more are needed"):
        evaluate(archive(tmp_path / "few.npz", images[:3]), reference, weights=weights, device="cpu")
    with pytest.raises(FileNotFoundError, match=r"weights is 'nothing\.pth', which is not there"):
        evaluate(samples, reference, weights="nothing.pth", device="cpu")
    torch.save({"other": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="are not torch-fidelity's Inception"):
        evaluate(samples, reference, weights=weights, device="cpu")
    weights.write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match="are not torch-fidelity's Inception"):
        evaluate(samples, reference, weights=weights, device="cpu")


@pytest.mark.fidelity
def test_with_torch_fidelity_itself(real: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_prc import prc_features_to_metric

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
            """Leaves the random weights as they are."""

    torch.manual_seed(0)
    torch.save({}, tmp_path / "empty.pth")
    untrained = Untrained("x", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth"))
    torch.save(untrained.state_dict(), tmp_path / "random.pth")
    images, _ = real
    first, second = archive(tmp_path / "a.npz", images[:5]), archive(tmp_path / "b.npz", images[5:10])
    found = evaluate(first, second, weights=tmp_path / "random.pth", device="cpu")
    features = [
        untrained(torch.from_numpy(rows).permute(0, 3, 1, 2).expand(-1, 3, -1, -1))[0] for rows in (images[:5], images[5:10])
    ]
    moments = [(rows.double().mean(0).numpy(), np.cov(rows.double().numpy(), rowvar=False)) for rows in features]
    # of singular covariances the roots of two libraries agree to a root of the rounding
    assert found.frechet_distance == pytest.approx(frechet_distance(*moments), rel=1e-2)
    shares = prc_features_to_metric(*features, verbose=False)
    assert (found.precision, found.recall) == pytest.approx((shares["precision"], shares["recall"]))
    assert precision_recall(*features) == pytest.approx((shares["precision"], shares["recall"]))
