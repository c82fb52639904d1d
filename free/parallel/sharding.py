"""Any number of samples by any number of processes, into one folder: ``free-dit sample``.

A shard is a fixed range of samples that is drawn as one batch, always the same, by whichever process takes it. So a sample's
bits depend on the configuration and on its number, not on how many processes there were or when they were killed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from free.checks import check_count
from free.drafters import Drafter
from free.parallel.formats import Pixels
from free.parallel.manifest import agree
from free.parallel.recipe import Recipe
from free.parallel.shards import DamagedShardError, ShardFolder
from free.processes import ReverseProcess
from free.sampling.request import DEFAULT_STEPS
from free.targets import as_target
from free.version import __version__
from free.windows import WindowPlan

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_PLAN = "shards/windows.json"
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is. None needs to be told of the others: its place is where it begins."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Place:
        """As ``torchrun`` says it; alone without it."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


@dataclass
class Drawn:
    """What one process did."""

    samples: int = 0
    """That it drew; those that were there, or that others drew, do not count."""
    rounds: int = 0
    """Of those samples, added up."""
    steps: int = 0
    """S."""
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("sampling", "decoding", "writing", "waiting"), 0.0)
    )
    """``writing`` is encoding too; ``waiting`` is for other processes."""
    total_seconds: float = 0.0
    """From the first shard to the last file; without what comes once: loading, and planning the windows."""

    @property
    def overhead(self) -> float:
        """Seconds beside sampling, decoding and waiting, over those of sampling and decoding; NaN if none was drawn."""
        busy = self.seconds["sampling"] + self.seconds["decoding"]
        return (self.total_seconds - self.seconds["waiting"] - busy) / busy if busy else float("nan")

    def __str__(self) -> str:
        if not self.samples:
            return "nothing was left to draw here"
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return (
            f"{self.samples} samples drawn here in {self.total_seconds:.1f} s ({parts}), each of {self.steps} steps in "
            f"{self.rounds / self.samples:.1f} rounds"
        )


def sample_to_folder(
    model: Any,
    output_dir: str | Path,
    *,
    num_samples: int,
    batch_size: int = 64,
    sampler: str = "speculative",
    drafter: str | Drafter | Any = "gains",
    window: int | str | WindowPlan = "auto",
    class_labels: str | Sequence[int] | None = "uniform",
    shape: Sequence[int] | None = None,
    process: ReverseProcess | SchedulerMixin | None = None,
    num_inference_steps: int = DEFAULT_STEPS,
    guidance_scale: float = 1.0,
    seed: int = 0,
    file_format: str | None = None,
    vae: Any = None,
    decode_batch_size: int = 8,
    place: Place | None = None,
    progress: bool = True,
) -> Drawn:
    """Draw samples 0 … ``num_samples - 1`` into a folder, together with all other processes that are told the same.

    Sample i has the key of row i of ``free.speculative_sample(seed=seed, num_samples=…)``, and a label that follows from the
    seed and i. Shards of ``batch_size`` samples in a row are drawn as one batch each, in any order, by any process. So the
    files are the same whatever the number of processes, and however often they were stopped, on one kind of device and with
    as many threads; where the model gives a state the same bits in any batch they are the same for each ``batch_size`` too.
    A process that is killed loses the batch under way, which another one takes over. The same call goes on where a folder is
    not finished.

    Args:
        model: as in :func:`free.speculative_sample`; of a ``DiTPipeline`` its scheduler and VAE count.
        output_dir: the folder, of one configuration; made if it is not there.
        num_samples: N.
        batch_size: samples of a shard.
        sampler: ``"speculative"`` or ``"ancestral"``.
        drafter: as there; the ancestral sampler has none.
        window: as there, but ``"auto"`` plans the windows once for the folder, by :func:`free.plan_window` on the device of
            the process that comes first. For a full batch that is mostly a window of 1, the ancestral sampler.
        class_labels: ``"uniform"`` draws a label for each sample; ``"balanced"`` gives all classes in turn; ints are given
            in turn; None is the null class, or no labels.
        shape, process, num_inference_steps, guidance_scale: as there.
        seed: an int.
        file_format: ``"png"``, ``"npz"`` or ``"latents"`` (:mod:`free.parallel.formats`); left out, PNG where samples are
            images or a VAE decodes them, else latents.
        vae: an ``AutoencoderKL``; left out, the pipeline's.
        decode_batch_size: samples decoded at once.
        place: of this process; left out, as ``torchrun`` says it. The first process waits for all shards, takes over those
            of processes that died, and finishes the files.
        progress: show a bar with the rate and the time left, on the first process.

    Returns:
        :class:`Drawn`: what this process did.

    Raises:
        ValueError, TypeError: a wrong argument, named, before any work is done.
        OtherConfigurationError: the folder holds samples of another configuration.
        StorageError: the disk is full, or cannot be written or read; what was finished is kept.
        NonFiniteOutputError: as in :func:`free.speculative_sample`.
    """
    pixels = Pixels(getattr(model, "vae", None) if vae is None else vae, check_count("decode_batch_size", decode_batch_size))
    options = {
        "shape": shape, "process": process, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale
    }  # fmt: skip
    recipe = Recipe(
        as_target(model), num_samples, batch_size, sampler, drafter, window, class_labels, seed, options, file_format, pixels
    )
    place = Place.from_environment() if place is None else place
    with ShardFolder(Path(output_dir), recipe.shards) as folder:
        notes = {"free-dit": __version__, "torch": torch.__version__, "device": recipe.device.type}
        agree(folder, recipe.configuration(), notes)
        return _Worker(recipe, folder, place, progress).work()


class _Worker:
    """One process among those that fill a folder."""

    def __init__(self, recipe: Recipe, folder: ShardFolder, place: Place, progress: bool) -> None:
        self.recipe, self.folder, self.place = recipe, folder, place
        self.first = place.rank == 0
        self.progress = progress and self.first
        self.drawn = Drawn(steps=recipe.request.process.num_steps)
        final = recipe.format.final
        self.final = None if final is None else folder.root / final

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        if self.final is not None:
            return self.final.exists()
        return self.folder.done_count() == self.folder.count

    def work(self) -> Drawn:
        if self.final is None or not self.final.exists():
            self._verify()
        if not self.finished:
            window = self._window()
            begin = time.perf_counter()
            self._fill(window)
            self.drawn.total_seconds = time.perf_counter() - begin
        if self.first:
            for shard in range(self.folder.count if self.final is not None else 0):
                self.folder.drop(shard)
            self.folder.drop_parts()
        return self.drawn

    def _verify(self) -> None:
        """Read what is there of this process's share: a shard that is not whole is drawn again."""
        for shard in range(self.place.rank, self.folder.count, self.place.world):
            with self.folder.claim(shard) as mine:
                if mine and self.folder.done(shard):
                    try:
                        self.folder.read(shard)
                    except DamagedShardError as error:
                        if self.final is not None and self.final.exists():
                            return  # its files are no longer needed
                        _say(f"{error}; it is drawn again")

    def _window(self) -> int | WindowPlan | None:
        """Of the speculative sampler; planned by whoever comes first, once for the folder."""
        if not self.recipe.speculative:
            return None
        if not isinstance(self.recipe.window, str):
            return self.recipe.window
        path = self.folder.root / _PLAN
        while not path.exists():
            with self.folder.claim(self.folder.count) as mine:
                if mine and not path.exists():
                    with tempfile.TemporaryDirectory() as scratch:
                        plan = Path(scratch) / path.name
                        self.recipe.plan().save(plan)
                        self.folder.publish(_PLAN, plan.read_bytes())
            if not mine:
                time.sleep(_POLL_SECONDS)
        return WindowPlan.load(path)

    def _fill(self, window: int | WindowPlan | None) -> None:
        total, done = self.recipe.num_samples, self._samples_done()
        with tqdm(total=total, initial=done, disable=not self.progress, unit="sample") as bar:
            while True:
                self._draw_missing(window, bar)
                # the others have nothing left to do: the first takes over what one that died had claimed
                if not self.first or self._finish():
                    return

    def _draw_missing(self, window: int | WindowPlan | None, bar: Any) -> None:
        """Draw what nobody else does; the first process comes back until all shards are there."""
        count = self.folder.count
        begin = self.place.rank * count // self.place.world
        missing = dict.fromkeys((begin + i) % count for i in range(count))
        while missing:
            before = len(missing)
            for shard in tuple(missing):
                with self._unless_done(shard) as mine:
                    if mine:
                        self._draw(shard, window)
                        bar.update(self._samples_done() - bar.n)
                if self.folder.done(shard):
                    del missing[shard]
            if not self.first:
                return
            if len(missing) == before:
                bar.update(self._samples_done() - bar.n)
                with self._watch("waiting"):
                    time.sleep(_POLL_SECONDS)

    @contextmanager
    def _unless_done(self, shard: int) -> Iterator[bool]:
        """Within this context nobody else draws a shard that is not there, if the value is True."""
        if self.folder.done(shard):
            yield False
            return
        with self.folder.claim(shard) as mine:
            yield mine and not self.folder.done(shard)

    def _draw(self, shard: int, window: int | WindowPlan | None) -> None:
        recipe, samples = self.recipe, self.recipe.samples_of(shard)
        with self._watch("sampling"):
            try:
                output = recipe.draw(samples, window)
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"batch_size is {recipe.batch_size}, for which the device's memory is too small; give a smaller one, "
                    f"and another folder: {error}"
                ) from error
        with self._watch("decoding"):
            values = recipe.pixels(output.samples) if recipe.format.pixels else output.samples.cpu().numpy()
        rounds, labels = int(output.stats.rounds.sum()), recipe.labels_of(samples)
        with self._watch("writing"):
            files = recipe.format.files(shard, samples[0], values, labels)
            self.folder.write(shard, files, {"samples": [samples[0], samples[-1]], "labels": labels, "rounds": rounds})
        self.drawn.samples += len(samples)
        self.drawn.rounds += rounds

    def _finish(self) -> bool:
        """Make the file of all samples, where there is one; False if a shard has to be drawn again for it."""
        if self.final is None:
            return True
        while not self.final.exists():
            with self.folder.claim(self.folder.count + 1) as mine, self._watch("writing" if mine else "waiting"):
                if mine and not self.final.exists():
                    try:
                        self.recipe.format.finish(self.folder, self.recipe.num_samples)
                    except DamagedShardError as error:
                        _say(f"{error}; it is drawn again")
                        return False
                elif not mine:
                    time.sleep(_POLL_SECONDS)
        return True

    def _samples_done(self) -> int:
        return min(self.folder.done_count() * self.recipe.batch_size, self.recipe.num_samples)

    @contextmanager
    def _watch(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.drawn.seconds[phase] += time.perf_counter() - begin


def _say(text: str) -> None:
    tqdm.write(f"free-dit: {text}", file=sys.stderr)
