"""What is drawn into a folder: each sample by its number, and all that decides what it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from free.checks import check_count, is_int
from free.drafters import as_drafter
from free.parallel.formats import FORMATS, Format, Pixels
from free.parallel.manifest import drafter_fingerprint, model_fingerprint
from free.sampling.planning import plan_window
from free.sampling.request import DEFAULT_STEPS, Options, check_request, sample_keys
from free.sampling.samplers import SamplingOutput, ancestral_sample, speculative_sample
from free.targets import DiTTarget, Target
from free.targets.loading import digest
from free.windows import WindowPlan, check_window

SAMPLERS = ("speculative", "ancestral")
LABELS = ("uniform", "balanced")
_LABEL_WORD = 0x6C61626C  # 'labl': a second spawn word; a sample's key has one, so the two never collide


@dataclass
class Recipe:
    """Samples 0 … N-1 and the shards that they are drawn in; checked as it is made. The fields are arguments of
    :func:`free.parallel.sharding.sample_to_folder`.

    Raises:
        ValueError, TypeError: a wrong one, named.
    """

    target: Target
    num_samples: int
    batch_size: int
    sampler: str
    drafter: Any
    window: int | str | WindowPlan
    class_labels: str | Sequence[int] | None
    seed: int
    options: dict[str, Any]
    """``shape``, ``process``, ``num_inference_steps``, ``guidance_scale``."""
    file_format: str | None
    pixels: Pixels

    def __post_init__(self) -> None:
        self.num_samples = check_count("num_samples", self.num_samples)
        self.batch_size = check_count("batch_size", self.batch_size)
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; allowed are {', '.join(map(repr, SAMPLERS))}")
        check_window(self.window)
        if not is_int(self.seed):
            raise ValueError(f"seed is {self.seed!r}; allowed is an int, from which each sample's key follows")
        self._cycle = _cycle(self.class_labels, self.target)
        self.request = check_request(self.target, Options(class_labels=self._cycle, seed=0, **self.options))
        self.options = {**self.options, "process": self.request.process, "num_inference_steps": DEFAULT_STEPS}
        if self.speculative:
            self.drafter = as_drafter(self.drafter, self.device)
            self.drafter.check(self.target)
        self.format = self._format()

    @property
    def speculative(self) -> bool:
        return self.sampler == "speculative"

    @property
    def device(self) -> torch.device:
        """Where samples are drawn."""
        return self.request.seed.device

    @property
    def shards(self) -> int:
        """How many."""
        return -(-self.num_samples // self.batch_size)

    def samples_of(self, shard: int) -> range:
        """The samples of a shard."""
        return range(shard * self.batch_size, min((shard + 1) * self.batch_size, self.num_samples))

    def labels_of(self, samples: Iterable[int]) -> list[int] | None:
        """One a sample, which follows from its number and the seed; None without labels."""
        if self._cycle is None:
            return None
        if self.class_labels == "uniform":
            return [_uniform(self.seed, i, len(self._cycle)) for i in samples]
        return [self._cycle[i % len(self._cycle)] for i in samples]

    def configuration(self) -> dict[str, Any]:
        """All that decides what the samples are, but for the device; JSON-ready."""
        vae = self.pixels.vae if self.format.pixels else None
        window: Any = self.window.windows.tolist() if isinstance(self.window, WindowPlan) else self.window
        labels = self.class_labels
        return {
            "model": model_fingerprint(self.target),
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "vae": None if vae is None else digest(vae.state_dict().values()),
            "decode_batch_size": None if vae is None else self.pixels.chunk,
            "sampler": self.sampler,
            "drafter": drafter_fingerprint(self.drafter) if self.speculative else None,
            "window": window if self.speculative else None,
            "steps": self.request.process.num_steps,
            "process": digest([], self.request.process.fingerprint().hex()),
            "guidance_scale": self.request.guidance_scale,
            "class_labels": labels if labels is None or isinstance(labels, str) else self._cycle,
            "seed": self.seed,
            "num_samples": self.num_samples,
            "batch_size": self.batch_size,
            "format": self.format.name,
        }

    def plan(self) -> WindowPlan:
        """The windows of all shards, by a pilot as large as the first one."""
        return plan_window(self.target, self.drafter, seed=self.seed, **self._given(self.samples_of(0)), **self.options)

    def draw(self, samples: range, window: int | WindowPlan | None) -> SamplingOutput:
        """The samples of these numbers, as one batch; ``window`` is None of the ancestral sampler."""
        arguments = {"seed": sample_keys(self.seed, samples), **self._given(samples), **self.options}
        if window is None:
            return ancestral_sample(self.target, **arguments)
        return speculative_sample(self.target, self.drafter, window=window, **arguments)

    def _given(self, samples: range) -> dict[str, Any]:
        labels = self.labels_of(samples)
        return {"num_samples": len(samples)} if labels is None else {"class_labels": labels}

    def _format(self) -> Format:
        drawable = self.pixels.fits(self.request.sample_shape)
        name = self.file_format or ("png" if drawable else "latents")
        if name not in FORMATS:
            raise ValueError(f"file_format is {name!r}; allowed are {', '.join(map(repr, FORMATS))}")
        chosen = FORMATS[name]()
        if chosen.pixels and not drawable:
            raise ValueError(
                f"file_format is {name!r}, but samples of shape {self.request.sample_shape} are no images, and there is no "
                "VAE to decode them; allowed is 'latents'"
            )
        return chosen


def _cycle(class_labels: Any, target: Target) -> list[int] | None:
    """The labels that samples choose from or take in turn; None without labels."""
    if class_labels is None:
        return None
    if not isinstance(class_labels, str):
        labels = list(class_labels) if hasattr(class_labels, "__iter__") else [class_labels]
        if not labels or not all(map(is_int, labels)):
            raise ValueError(f"class_labels is {class_labels!r}; allowed are {', '.join(map(repr, LABELS))}, ints, or None")
        return [int(label) for label in labels]
    if class_labels not in LABELS:
        raise ValueError(f"class_labels is {class_labels!r}; allowed are {', '.join(map(repr, LABELS))}, ints, or None")
    if not isinstance(target, DiTTarget):
        raise ValueError(f"class_labels is {class_labels!r}, but this model does not say how many classes it has; give ints")
    return list(range(target.null_class))


def _uniform(seed: int, sample: int, classes: int) -> int:
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=(sample, _LABEL_WORD))
    return int(sequence.generate_state(1, np.uint64)[0]) % classes
