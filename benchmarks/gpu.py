"""Speculative sampling on a GPU, measured: ``python -m benchmarks.gpu``, then ``python -m benchmarks.draw``.

The parts, each within eight minutes on an H100 (end to end: each model), what was left out for want of time being said in a
row and taken up by ``--resume``:

windows      T(W), the forward of DiT-S/2 … XL/2 over W states, eager, compiled and captured
share        what a round takes beside the target's forward
end-to-end   trained DiTs: seconds a sample, ancestral and speculative, and the bound
projection   W split over several GPUs, projected from T(W)

Rows are appended to ``benchmarks/results/gpu.jsonl``.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import end_to_end, latency, projection
from benchmarks.models import B2, L2, S2, XL2, XL2_512, Recipe, Size
from benchmarks.record import Record
from benchmarks.rows import RESULTS
from free.evaluation.rows import ROOT
from free.training import TargetTrainingConfig
from free.windows import WINDOWS

PARTS = ("windows", "share", "end-to-end", "projection")
_TRAINING_NEEDS = ("accelerate", "skimage", "sklearn")
_WEIGHTS = ROOT / "build" / "benchmarks"  # of the trained models, for --resume


@dataclass(frozen=True)
class Scale:
    """What is measured."""

    sizes: tuple[Size, ...] = (XL2, S2, XL2_512, B2, L2)
    shared: tuple[Size, ...] = (XL2, S2)
    share_window: int = 8
    recipes: tuple[Recipe, ...] = (
        Recipe(
            XL2,
            TargetTrainingConfig(
                num_steps=450, batch_size=64, learning_rate=2e-4, warmup_steps=50, max_seconds=130, autocast=True
            ),
            {"max_train_steps": 350, "train_batch_size": 8, "learning_rate": 3e-4, "reuse": 2},
        ),
        Recipe(
            S2,
            TargetTrainingConfig(
                num_steps=1500, batch_size=128, learning_rate=5e-4, warmup_steps=100, max_seconds=90, autocast=True
            ),
            {"max_train_steps": 800, "train_batch_size": 16, "learning_rate": 3e-4},
        ),
    )
    batches: tuple[int, ...] = (1, 4, 16)
    windows: tuple[int, ...] = WINDOWS
    fixed: tuple[int, ...] = (8, 16, 32)
    """Windows that are sampled with."""
    steps: int = 250

    def only(self, models: Sequence[str], batches: Sequence[int]) -> Scale:
        """Of these models, at these batch sizes."""
        return replace(
            self,
            sizes=tuple(size for size in self.sizes if size.name in models),
            shared=tuple(size for size in self.shared if size.name in models),
            recipes=tuple(recipe for recipe in self.recipes if recipe.size.name in models),
            batches=tuple(batches),
        )

    @property
    def models(self) -> list[str]:
        return [size.name for size in self.sizes]


_TOY_SIZE = Size("toy", 1, 2, 8)
TOY = Scale(
    sizes=(replace(_TOY_SIZE, latent=8),),
    shared=(replace(_TOY_SIZE, latent=8),),
    share_window=4,
    recipes=(
        Recipe(
            _TOY_SIZE,
            TargetTrainingConfig(num_steps=3, batch_size=4, warmup_steps=1),
            {"max_train_steps": 2, "train_batch_size": 2, "num_inference_steps": (12,), "window": 4, "subset": 0.01},
        ),
    ),
    batches=(1, 2),
    windows=(1, 2, 4),
    fixed=(2, 4),
    steps=12,
)


def run(scale: Scale, parts: list[str], record: Record, device: torch.device, weights: Path) -> None:
    """Measure these parts; trained models are kept in ``weights``."""
    if "windows" in parts:
        record.begin()
        latency.measure_windows(record, scale.sizes, scale.batches, scale.windows, device)
    if "share" in parts:
        record.begin()
        latency.measure_share(record, scale.shared, scale.batches, scale.share_window, device)
    if "end-to-end" in parts:
        for recipe in scale.recipes:
            record.begin()
            end_to_end.measure(
                record, recipe, scale.batches, scale.fixed, scale.windows, scale.steps, device, weights
            )  # fmt: skip
    if "projection" in parts:
        projection.project(record, [recipe.size.name for recipe in scale.recipes], scale.batches, scale.fixed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="all if left out")
    parser.add_argument("--models", nargs="+", choices=Scale().models, help="all if left out; a dry run has its own")
    parser.add_argument("--batches", nargs="+", type=int, help="as --models")
    parser.add_argument("--minutes", type=float, default=7, help="a part begins nothing after these")
    parser.add_argument("--resume", action="store_true", help="leave out what the rows hold; reuse trained models")
    parser.add_argument("--results", type=Path, default=None, metavar="FOLDER", help="of the rows")
    parser.add_argument(
        "--toy", action="store_true", help="a dry run at toy size, on a CPU too; rows go to gpu-toy.jsonl in a new folder"
    )
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.toy:
        print("there is no CUDA device; --toy is a dry run without one", file=sys.stderr)
        return 1
    missing = [name for name in _TRAINING_NEEDS if importlib.util.find_spec(name) is None]
    if missing and "end-to-end" in options.part:
        print(f"--part end-to-end needs {', '.join(missing)}: pip install 'free-dit[train]'", file=sys.stderr)
        return 1
    full = Scale()
    scale = TOY if options.toy else full.only(options.models or full.models, options.batches or full.batches)
    results = options.results or (Path(tempfile.mkdtemp()) if options.toy else RESULTS)
    record = Record(
        "gpu-toy" if options.toy else "gpu",
        toy=options.toy,
        resume=options.resume,
        minutes=options.minutes,
        results=results,
    )
    if not (options.resume or options.toy):
        shutil.rmtree(_WEIGHTS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) if options.toy else _WEIGHTS
        run(scale, options.part, record, device, weights)
    print(f"{len(record.rows)} rows in {record.name}.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
