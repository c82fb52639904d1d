"""Training a drafter for a frozen DiT: draw examples, step, average, checkpoint, validate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from free.data.images import LatentData, open_images
from free.drafters.feature import FeatureDrafter
from free.outputs import check_folder, writing
from free.targets.loading import fingerprint
from free.training.checkpoint import Checkpoints, random_state, set_random_state
from free.training.config import DrafterTrainingConfig, continued
from free.training.examples import Examples
from free.training.loss import drafter_loss
from free.training.noised import NoisedPairs
from free.training.setup import load_target_and_vae, make_accelerator, set_seeds, take_weights
from free.training.validation import acceptance, predicted_efficiency, real_efficiency
from free.training.visited import VisitedWindows

_LOGGED = ("loss", "noise", "feature", "smooth")
_VALIDATION_BATCHES = 16
_SETTLING_BATCHES = 2  # a pool begins with less to lean on than later
_PRECISION = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Source = VisitedWindows | NoisedPairs


def train_drafter(config: DrafterTrainingConfig, model: Any = None) -> FeatureDrafter:
    """Train a :class:`free.FeatureDrafter` for a DiT and save it in ``config.output_dir``.

    On as many processes as ``accelerate launch`` started. A run that is taken up again by ``resume_from_checkpoint`` ends
    with the weights of one that was never stopped, to the bit where the device computes reproducibly.

    Args:
        config: the settings.
        model: a ``DiTTransformer2DModel``, ``DiTPipeline`` or their :class:`free.Target`, instead of
            ``config.pretrained_model_name_or_path``. It is moved to the run's device and precision.

    Returns:
        The drafter as it was saved, on the target's device.

    Raises:
        ValueError, OSError: wrong settings, model, data or checkpoint; before training begins.
        ImportError: the ``train`` extra is not installed.
        FloatingPointError: the loss or its gradient is not finite; the message says which checkpoint is the last good one.
    """
    return _Run(config, model).train()


class _Run:
    """The state of one process of a training run."""

    def __init__(self, config: DrafterTrainingConfig, model: Any) -> None:
        self.config, self.output_dir = config, Path(config.output_dir)
        self.accelerator = accelerator = make_accelerator(config)
        self.target, vae = load_target_and_vae(config, model)
        scheduler = self.target.scheduler
        self.scheduler = None if scheduler is None else DDPMScheduler.from_config(scheduler.config)
        self.target.transformer.to(accelerator.device).type(_PRECISION[config.mixed_precision])
        self.processes = [self.target.default_process(n).to(accelerator.device) for n in config.num_inference_steps]
        self.data = self._open_data(None if vae is None else vae.eval().to(accelerator.device))

        set_seeds(config.seed)
        base = None if config.base == "none" else cast(Any, config.base)
        self.drafter = FeatureDrafter.from_target(self.target, base=base, sweeps=config.sweeps).float()
        if config.begin_with is not None:
            take_weights(self.drafter, config.begin_with)
        self.ema = EMAModel(self.drafter.parameters(), decay=config.ema_decay) if config.use_ema else None
        optimizer = torch.optim.AdamW(
            self.drafter.parameters(), lr=config.learning_rate, weight_decay=config.adam_weight_decay
        )
        self.schedule = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.block, self.optimizer = accelerator.prepare(self.drafter, optimizer)
        # each process meets noise of its own
        set_seeds(config.seed + 1 + accelerator.process_index)
        self.sources = self._make_sources(config.unroll, config.reuse)
        self.step = 0
        configuration = {
            **continued(config),
            "model": fingerprint(self.target),
            "data": self.data.fingerprint,
            "num_processes": accelerator.num_processes,
        }
        self.checkpoints = Checkpoints(accelerator, self.output_dir, configuration, config.checkpoints_total_limit)
        folder = self.checkpoints.find(config.resume_from_checkpoint)
        if folder is not None:
            self._resume(folder)
        elif config.resume_from_checkpoint is not None:
            accelerator.print(f"no checkpoint in {self.output_dir} yet: a new run begins")

    def train(self) -> FeatureDrafter:
        config, accelerator = self.config, self.accelerator
        check_folder("output_dir", self.output_dir, FeatureDrafter.__name__)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if config.report_to != "none":
            accelerator.init_trackers("drafter")
        batches = self._batches(first=self.step * config.gradient_accumulation_steps)
        bar = tqdm(
            total=config.max_train_steps, initial=self.step, desc="drafter", disable=not accelerator.is_local_main_process
        )
        with bar:
            while self.step < config.max_train_steps:
                logged = self._take_step(batches)
                self.step += 1
                accelerator.log(logged, step=self.step)
                bar.update()
                bar.set_postfix(loss=f"{logged['loss']:.4g}", accepted=f"{logged['accepted']:.3f}")
                last = self.step == config.max_train_steps
                if self.step % config.checkpointing_steps == 0:
                    self._checkpoint()
                if last or self.step % config.validation_steps == 0:
                    self._validate(bar)
        return self._finish()

    def _take_step(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        """One optimizer step; what it says, mean over batches and processes."""
        accelerator, config = self.accelerator, self.config
        total = torch.zeros(len(_LOGGED) + 1, device=accelerator.device)
        for batch in range(config.gradient_accumulation_steps):
            number = self.step * config.gradient_accumulation_steps + batch
            examples = self._draw(self.sources[number % len(self.sources)], *next(batches))
            whole = batch + 1 == config.gradient_accumulation_steps
            with nullcontext() if whole else accelerator.no_sync(self.block):
                terms = self._loss(examples)
                accelerator.backward(terms["loss"] / config.gradient_accumulation_steps)
            accepted = acceptance(terms["delta"]).mean()
            total += torch.stack([*(terms[name].detach() for name in _LOGGED), accepted])
        norm = accelerator.clip_grad_norm_(self.block.parameters(), config.max_grad_norm)
        total = accelerator.reduce(total / config.gradient_accumulation_steps, reduction="mean")
        values = dict(zip((*_LOGGED, "accepted", "grad_norm"), [*total.tolist(), float(norm)], strict=True))
        self._check_finite(values)
        learning_rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.drafter.parameters())
        return {**values, "learning_rate": learning_rate}

    def _draw(self, source: Source, images: torch.Tensor, labels: torch.Tensor) -> Examples:
        """Examples of a batch: images [n, C, H, W], encoded where they are needed; some of the labels int64 [n] dropped."""
        device = self.accelerator.device
        dropped = torch.rand(len(labels)) < self.config.label_dropout
        labels = torch.where(dropped, self.target.null_class, labels).to(device)

        def clean() -> torch.Tensor:
            return self.data.encode(images.to(device, non_blocking=True))

        examples = source.draw(self.drafter, clean, labels)
        while not len(examples.step):  # every live sample stood at its last step
            examples = source.draw(self.drafter, clean, labels)
        return examples

    def _loss(self, examples: Examples) -> dict[str, torch.Tensor]:
        config = self.config
        return drafter_loss(
            self.drafter,
            examples,
            kind=cast(Any, config.loss_kind),
            feature_weight=config.feature_weight,
            smooth_weight=config.smooth_weight,
            block=self.block,
        )

    def _check_finite(self, values: dict[str, float]) -> None:
        names = ["loss"] if self.accelerator.scaler else ["loss", "grad_norm"]  # a scaler passes over such gradients itself
        for name in names:
            if not torch.isfinite(torch.tensor(values[name])):
                found = self.checkpoints.all()
                kept = f"the last good checkpoint is {str(found[-1])!r}" if found else "there is no checkpoint yet"
                raise FloatingPointError(f"{name} is {values[name]} at training step {self.step + 1}; {kept}")

    @torch.no_grad()
    def _validate(self, bar: tqdm) -> None:
        """Log the efficiencies that the averaged weights promise and have. The random state stays as it was."""
        accelerator, config = self.accelerator, self.config
        if accelerator.is_main_process:
            devices = [accelerator.device] if accelerator.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices), self._averaged():
                torch.manual_seed(config.seed)
                logged = self._efficiencies()
            words = ", ".join(f"{name} {value:.3f}" for name, value in logged.items())
            bar.write(f"step {self.step}: {words}")
            accelerator.log({f"validation/{name}": value for name, value in logged.items()}, step=self.step)
        accelerator.wait_for_everyone()

    def _efficiencies(self) -> dict[str, float]:
        config, logged = self.config, {}
        fresh = self._batches(first=0, seed=config.seed + 1)
        drafts = min(config.window - 1, *(process.num_steps - 2 for process in self.processes))
        for source, process in zip(self._make_sources(drafts, reuse=1), self.processes, strict=True):
            steps = process.num_steps
            for _ in range(_SETTLING_BATCHES):
                self._draw(source, *next(fresh))
            draws = (self._draw(source, *next(fresh)) for _ in range(_VALIDATION_BATCHES))
            logged[f"predicted efficiency S={steps}"] = predicted_efficiency(self.drafter, draws, process, config.window)
            if config.validation_samples:
                mean, error = real_efficiency(
                    self.target,
                    self.drafter,
                    process,
                    config.guidance_scale,
                    config.window,
                    config.validation_samples,
                    config.seed,
                )
                logged |= {f"efficiency S={steps}": mean, f"standard error S={steps}": error}
        return logged

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within this context the drafter has its averaged weights."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.drafter.parameters())
        self.ema.copy_to(self.drafter.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.drafter.parameters())

    def _checkpoint(self) -> None:
        scaler = self.accelerator.scaler
        shared = {
            "weights": self.drafter.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        visited = [source.state_dict() for source in self.sources if isinstance(source, VisitedWindows)]
        own = {"random": random_state(), "visited": visited}
        self.checkpoints.save(self.step, shared, own, self._save_drafter)

    def _resume(self, folder: Path) -> None:
        self.step, shared, own = self.checkpoints.load(folder)
        self.drafter.load_state_dict(shared["weights"])
        self.optimizer.load_state_dict(shared["optimizer"])
        self.schedule.load_state_dict(shared["schedule"])
        if self.ema is not None:
            self.ema.load_state_dict(shared["ema"])
            self.ema.to(self.accelerator.device)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(shared["scaler"])
        visited = [source for source in self.sources if isinstance(source, VisitedWindows)]
        for source, state in zip(visited, own["visited"], strict=True):
            source.load_state_dict(state)
        set_random_state(own["random"])
        self.accelerator.print(f"continuing from {folder}")

    def _finish(self) -> FeatureDrafter:
        accelerator = self.accelerator
        if accelerator.is_main_process:
            with writing("drafter", self.output_dir):
                self._save_drafter(self.output_dir)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return FeatureDrafter.from_pretrained(self.output_dir).to(accelerator.device)

    def _save_drafter(self, folder: Path) -> None:
        settings = {name: value for name, value in self.drafter.config.items() if not name.startswith("_")}
        with torch.random.fork_rng(devices=[]):  # new weights are random at first
            saved = FeatureDrafter(**settings)
        with self._averaged():
            saved.load_state_dict(self.drafter.state_dict())
        saved.type(getattr(torch, self.config.save_dtype)).save_pretrained(folder)

    def _make_sources(self, unroll: int, reuse: int) -> list[Source]:
        """A new source of examples for each process."""
        config = self.config
        if config.states == "windows":
            pool = config.train_batch_size
            return [
                VisitedWindows(
                    self.target,
                    process,
                    config.guidance_scale,
                    window=config.window,
                    pool=pool,
                    reuse=reuse,
                    scheduler=self.scheduler,
                )
                for process in self.processes
            ]
        return [
            NoisedPairs(
                self.target,
                process,
                config.guidance_scale,
                unroll=unroll,
                depth_weight=config.depth_weight,
                scheduler=self.scheduler,
            )
            for process in self.processes
        ]

    def _open_data(self, vae: Any) -> LatentData:
        config, shape = self.config, self.target.sample_shape
        assert shape is not None
        images = open_images(
            shape,
            dataset=config.dataset,
            train_data_dir=config.train_data_dir,
            resolution=config.resolution,
            vae=vae,
            skip_unreadable=config.skip_unreadable,
        )
        return LatentData(images, shape, self.target.null_class, vae=vae, subset=config.subset, seed=config.seed)

    def _batches(self, first: int, seed: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        config, accelerator = self.config, self.accelerator
        return self.data.batches(
            config.train_batch_size,
            seed=config.seed if seed is None else seed,
            first=first,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            num_workers=config.dataloader_num_workers,
        )
