"""Training of drafters: its data, loss, validation, checkpoints, and what it refuses."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import free
import free.training.checkpoint
import free.training.visited
from free.data.images import Digits, ImageFolder, LatentData, Photos, Rows, open_images
from free.drafters.loading import drafter_of
from free.training import DrafterTrainingConfig, train_drafter
from free.training.checkpoint import load_tree, random_state, save_tree, set_random_state
from free.training.config import add_arguments
from free.training.loss import drafter_loss
from free.training.noised import NoisedPairs
from free.training.validation import acceptance, expected_rounds
from free.training.visited import VisitedWindows

MakeDiT = Callable[..., DiTTransformer2DModel]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_dit(in_channels: int = 1, num_classes: int = 10) -> DiTTransformer2DModel:
    """Width 32, 16 tokens; takes digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=in_channels,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=num_classes,
        )
    return model.eval()


def settings(output_dir: Path, **changes: Any) -> DrafterTrainingConfig:
    """A run of a second."""
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "dataset": "digits",
        "num_inference_steps": (10,),
        "window": 4,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "validation_steps": 100,
        "validation_samples": 0,
        "report_to": "none",
    }
    return DrafterTrainingConfig(**{**values, **changes})


def image_folder(root: Path, *, classes: int = 2, size: tuple[int, int] = (12, 9)) -> Path:
    for label in range(classes):
        (root / f"class {label}").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", size, (255 * label, 10 * i, 128)).save(root / f"class {label}" / f"{i}.png")
    return root


# --- loss


def noised_examples(unroll: int, base: Any) -> tuple[free.FeatureDrafter, Any]:
    target = free.as_target(tiny_dit())
    torch.manual_seed(1)
    drafter = free.FeatureDrafter.from_target(target, base=base)
    source = NoisedPairs(target, target.default_process(10), 1.5, unroll=unroll, depth_weight=0.5)
    return drafter, source.draw(drafter, lambda: torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 10]))


def test_the_loss_is_its_terms_with_the_papers_weights() -> None:
    drafter, examples = noised_examples(2, None)
    terms = drafter_loss(drafter, examples, kind="mse", feature_weight=0.5, smooth_weight=0.005)
    # an untrained drafter predicts zero, and hands on the feature that it leant on
    weight = examples.weight / examples.weight.sum()
    assert examples.weight.tolist() == [1.0] * 3 + [0.5] * 3
    torch.testing.assert_close(terms["noise"], (weight * examples.wanted.square().mean(-1)).sum())
    off = (examples.feature - examples.next_feature).square().flatten(1).mean(-1)
    torch.testing.assert_close(terms["feature"], (weight * off).sum())
    assert terms["smooth"] == 0
    torch.testing.assert_close(terms["loss"], terms["noise"] + 0.5 * terms["feature"])
    assert terms["feature"] > 0


def test_delta_is_that_of_the_acceptance_test() -> None:
    drafter, examples = noised_examples(1, "hold-x0")
    process = examples.process
    terms = drafter_loss(drafter, examples, kind="log-delta")
    # the difference of the means over the noise, with hold-x0's draft
    model_coef, std = process.model_coef[examples.step], process.std[examples.step]
    expected = (model_coef / std).abs() * examples.wanted.norm(dim=-1)
    torch.testing.assert_close(terms["delta"], expected)
    torch.testing.assert_close(terms["loss"], expected.square().log1p().mean())
    torch.testing.assert_close(
        drafter_loss(drafter, examples, kind="rejection")["loss"], 1 - acceptance(expected).mean(), atol=1e-5, rtol=0.0
    )


def test_the_last_step_is_no_example() -> None:
    target = free.as_target(tiny_dit())
    process = target.default_process(4)
    drafter, source = free.FeatureDrafter.from_target(target, base="hold-x0"), NoisedPairs(target, process, 1.5, unroll=2)
    examples = source.draw(drafter, lambda: torch.randn(40, 1, 8, 8), torch.zeros(40, dtype=torch.int64))
    assert set(examples.step.tolist()) == {1, 2}
    assert torch.isfinite(drafter_loss(drafter, examples)["loss"])
    with pytest.raises(ValueError, match="unroll is 3; allowed is 1 … 2, the process has 4 steps"):
        NoisedPairs(target, process, 1.5, unroll=3)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_labels_are_dropped_before_the_target_sees_them(
    dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    draw = VisitedWindows.draw

    def spying(self: VisitedWindows, drafter: Any, clean: torch.Tensor, labels: torch.Tensor) -> Any:
        seen.append(labels)
        return draw(self, drafter, clean, labels)

    monkeypatch.setattr(VisitedWindows, "draw", spying)
    train_drafter(settings(tmp_path, label_dropout=dropout, max_train_steps=2), tiny_dit())
    labels = torch.cat(seen)
    assert ((labels == 10) == (dropout == 1)).all()


def test_a_round_is_learned_from_as_often_as_asked() -> None:
    target = free.as_target(tiny_dit())
    drafter = free.FeatureDrafter.from_target(target)
    torch.manual_seed(0)
    visited = VisitedWindows(target, target.default_process(10), 1.5, window=4, pool=2, reuse=3)
    asked = []

    def clean() -> torch.Tensor:
        asked.append(1)
        return torch.randn(2, 1, 8, 8)

    draws = [visited.draw(drafter, clean, torch.zeros(2, dtype=torch.int64)) for _ in range(12)]
    distinct = list({id(examples): examples for examples in draws}.values())
    assert len(distinct) <= 5  # a first one, then one in three
    assert all(id(examples) in map(id, visited.memory) for examples in distinct)
    assert asked == [1]  # data is noised once, for the pool's beginning
    # what is drawn next is a function of what is saved
    other = VisitedWindows(target, target.default_process(10), 1.5, window=4, pool=2, reuse=3)
    other.load_state_dict(visited.state_dict())
    for _ in range(4):
        state = torch.get_rng_state()
        first = visited.draw(drafter, clean, torch.zeros(2, dtype=torch.int64))
        torch.set_rng_state(state)
        second = other.draw(drafter, clean, torch.zeros(2, dtype=torch.int64))
        for one, two in (
            (first.wanted, second.wanted),
            (first.step, second.step),
            (first.anchor.state, second.anchor.state),
            (first.answer, second.answer),
        ):
            assert torch.equal(one, two)


def test_what_is_wanted_is_what_the_gains_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every draft: the target's word at the state is hold-x0's draft there, the gains' answer, and what is wanted."""
    target = free.as_target(tiny_dit())
    process, labels = target.default_process(12), torch.zeros(6, dtype=torch.int64)
    drafter = free.FeatureDrafter.from_target(target)
    torch.manual_seed(0)
    with torch.no_grad():
        drafter.to_output.weight.normal_(std=0.05)  # the path that the block sees is not the one that is tested
    rounds: list[Any] = []
    advance = free.training.visited.advance
    monkeypatch.setattr(free.training.visited, "advance", lambda *given: rounds.append(advance(*given)) or rounds[-1])
    visited = VisitedWindows(target, process, 1.5, window=5, pool=6)
    moved = 0.0
    for _ in range(8):  # samples end and begin again on the way
        examples = visited.draw(drafter, lambda: torch.randn(6, 1, 8, 8), labels)
        done = rounds[-1][1]
        counted = torch.arange(4) < (done.length - 1)[:, None]
        # what the block says on the gains' path is what was added to their drafts on the path that followed
        with torch.no_grad():
            said, _ = drafter.predict(
                examples.state, examples.step, examples.anchor, examples.label_embedding, process, answer=examples.answer
            )
        scale = (process.model_coef / process.std)[examples.step]
        delta = scale.abs() * (said - examples.wanted).norm(dim=-1)
        torch.testing.assert_close(delta, done.verification.squared_norm[counted].sqrt(), atol=1e-3, rtol=1e-3)
        moved = max(moved, float((scale[:, None] * examples.answer).norm(dim=-1).max()))
    assert moved > 0.1  # the gains had learned


# --- validation


def test_acceptance_is_equation_40() -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    delta = torch.tensor([0.0, 0.3, 1.0, 4.0])
    torch.testing.assert_close(acceptance(delta), 2 * normal.cdf(-delta / 2))


def test_expected_rounds() -> None:
    last = [9] * 10
    assert expected_rounds(np.ones(10), last, 4) == 3
    assert expected_rounds(np.zeros(10), last, 4) == 10
    assert expected_rounds(np.ones(10), [4] * 5 + [9] * 5, 8) == 2  # a step that is never drafted ends a window
    p = 0.7
    assert expected_rounds(np.full(3, p), [2] * 3, 2) == pytest.approx(1 + (1 - p) * (2 - p) + p)


def test_validation_predicts_what_the_sampler_then_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, max_train_steps=1, num_inference_steps=(20,), validation_samples=16, train_batch_size=16)
    train_drafter(config, tiny_dit())
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1: "))
    words = dict(part.rsplit(" ", 1) for part in printed.removeprefix("step 1: ").split(", "))
    predicted, real = float(words["predicted efficiency S=20"]), float(words["efficiency S=20"])
    assert 1 < real < 4
    assert predicted == pytest.approx(real, rel=0.25)


# --- data


def test_every_pass_takes_every_row_once_in_an_order_of_its_own() -> None:
    rows = [row for batch in islice(Rows(10, 4, seed=3), 5) for row in batch]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]
    assert rows != [row for batch in islice(Rows(10, 4, seed=4), 5) for row in batch]


def test_rows_begin_anywhere_and_are_split_over_the_processes() -> None:
    whole = list(islice(Rows(10, 2, seed=3), 8))
    assert list(islice(Rows(10, 2, seed=3, first=5), 3)) == whole[5:]
    parts = [list(islice(Rows(10, 2, seed=3, process=process, processes=2), 4)) for process in range(2)]
    assert [batch for pair in zip(*parts, strict=True) for batch in pair] == whole


def test_the_built_in_sets() -> None:
    digits, photos = Digits(), Photos()
    assert (len(digits), digits[0][0].shape, digits[0][1]) == (1797, (1, 8, 8), 0)
    patch, label = photos[7]
    assert patch.shape == (3, 32, 32)
    assert patch.abs().max() <= 1
    assert torch.equal(patch, photos[7][0])
    assert {photos[row][1] for row in range(60)} == set(range(6))
    assert label < 6


def test_a_subset_is_drawn_by_its_seed() -> None:
    digits = Digits()

    def rows(**arguments: Any) -> list[int]:
        return list(LatentData(digits, (1, 8, 8), 10, **arguments).images.indices)

    assert len(rows(subset=0.3)) == round(0.3 * 1797)
    assert rows(subset=0.3) == rows(subset=0.3)
    assert rows(subset=0.3) != rows(subset=0.3, seed=1)
    assert sorted(rows()) == list(range(1797))


def test_an_image_folder_is_cropped_to_its_middle_square(tmp_path: Path) -> None:
    (tmp_path / "b" / "deeper").mkdir(parents=True)
    (tmp_path / "a").mkdir()
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = (255, 127, 0)
    Image.fromarray(pixels).save(tmp_path / "b" / "deeper" / "wide.png")
    Image.new("L", (5, 9), 51).save(tmp_path / "a" / "tall.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    images = ImageFolder(tmp_path, 8)
    assert (len(images), images.num_classes) == (2, 2)
    assert [images[row][1] for row in range(2)] == [0, 1]
    torch.testing.assert_close(images[0][0], torch.full((3, 8, 8), 51 / 127.5 - 1))
    torch.testing.assert_close(images[1][0].mean((1, 2)), torch.tensor([1.0, 127 / 127.5 - 1, -1.0]))


def test_an_image_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder"):
        ImageFolder(tmp_path / "none", 8)
    with pytest.raises(ValueError, match="holds no sub-folders"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"class folder '.*empty' holds no images"):
        ImageFolder(tmp_path, 8)


def test_unreadable_images_are_named_and_skipped_on_request(tmp_path: Path) -> None:
    image_folder(tmp_path)
    (tmp_path / "class 0" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 6 images cannot be read: '.*0\.png'; see skip_unreadable"):
        LatentData(ImageFolder(tmp_path, 8), (3, 8, 8), 2)
    skipping = ImageFolder(tmp_path, 8, skip_unreadable=True)
    LatentData(skipping, (3, 8, 8), 2)
    assert torch.equal(skipping[0][0], skipping[1][0])
    # whole at its head, broken further on
    whole = tmp_path / "class 1" / "1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(whole)
    whole.write_bytes(whole.read_bytes()[:2000])
    images = ImageFolder(tmp_path, 8)
    images.check([4])
    with pytest.raises(ValueError, match=r"image '.*1\.png' cannot be read"):
        images[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "dataset is None and train_data_dir is None; give one of them"),
        ({"dataset": "digits", "train_data_dir": "x"}, "give one of them"),
        ({"dataset": "letters"}, "dataset is 'letters'; allowed are 'digits', 'photos'"),
        ({"train_data_dir": "x", "resolution": 16}, "resolution is 16; the model's samples of 8 a side need 8"),
        ({"train_data_dir": "x", "sample_shape": (4, 8, 8)}, "samples have 4 channels, which are no pixels; give vae"),
    ],
)
def test_data_that_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_images(**{"sample_shape": (3, 8, 8), **arguments})


def test_classes_and_shapes_beyond_the_models_are_refused() -> None:
    with pytest.raises(ValueError, match="the data has 10 classes; the model has 5"):
        LatentData(Digits(), (1, 8, 8), 5)
    with pytest.raises(ValueError, match=r"samples have shape \(1, 8, 8\); the model's have \(2, 8, 8\)"):
        LatentData(Digits(), (2, 8, 8), 10)


def test_a_folder_of_images_is_encoded_by_the_vae(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    vae.eval().save_pretrained(tmp_path / "vae")
    images = open_images((4, 8, 8), train_data_dir=image_folder(tmp_path / "images", size=(20, 18)), vae=vae)
    data = LatentData(images, (4, 8, 8), 2, vae=vae)
    pixels, labels = next(data.batches(3, seed=0))
    assert (pixels.shape, labels.shape) == ((3, 3, 16, 16), (3,))
    torch.manual_seed(1)
    latents = data.encode(pixels)
    torch.manual_seed(1)
    torch.testing.assert_close(latents, 0.5 * vae.encode(pixels).latent_dist.sample())
    config = settings(
        tmp_path / "out",
        dataset=None,
        train_data_dir=str(tmp_path / "images"),
        vae=str(tmp_path / "vae"),
        max_train_steps=1,
        subset=1.0,
    )
    assert train_drafter(config, tiny_dit(in_channels=4)).config.in_channels == 4


# --- checkpoints


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    tree = {"a": [1, 2.5, None, "x", True], 3: {"t": shared.T, "same": shared, "half": torch.ones((), dtype=torch.float16)}}
    save_tree(tree, tmp_path / "tree.safetensors")
    back = load_tree(tmp_path / "tree.safetensors")
    assert back["a"] == tree["a"]
    assert torch.equal(back[3]["t"], shared.T)
    assert torch.equal(back[3]["same"], shared)
    assert back[3]["half"].dtype == torch.float16


def test_a_random_state_is_continued(tmp_path: Path) -> None:
    def draws() -> list[Any]:
        return [random.random(), np.random.rand(), random.gauss(0, 1), torch.rand(3).tolist()]  # noqa: NPY002

    draws()
    save_tree(random_state(), tmp_path / "random.safetensors")
    expected = draws()
    draws()
    set_random_state(load_tree(tmp_path / "random.safetensors"))
    assert draws() == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"states": "noised", "base": "none", "unroll": 2, "num_inference_steps": (10, 6), "lr_scheduler": "cosine"},
        {"use_ema": False, "gradient_accumulation_steps": 2, "num_inference_steps": (10, 6)},
        {"reuse": 2},
    ],
)
def test_a_resumed_run_ends_as_if_never_stopped(changes: dict[str, Any], tmp_path: Path) -> None:
    train_drafter(settings(tmp_path / "whole", **changes), tiny_dit())
    resumed = settings(tmp_path / "whole", resume_from_checkpoint="checkpoint-2", **changes)
    whole = (tmp_path / "whole" / WEIGHTS).read_bytes()
    last = (tmp_path / "whole" / "checkpoint-4" / "training.safetensors").read_bytes()
    train_drafter(resumed, tiny_dit())
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == whole
    assert (tmp_path / "whole" / "checkpoint-4" / "training.safetensors").read_bytes() == last
    start = free.FeatureDrafter.from_pretrained(tmp_path / "whole" / "checkpoint-2").state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in load_file(tmp_path / "whole" / WEIGHTS).items())


def test_checkpoints_that_cannot_be_continued_are_refused(tmp_path: Path) -> None:
    train_drafter(settings(tmp_path, max_train_steps=2), tiny_dit())
    with pytest.raises(ValueError, match=r"output_dir '.*' holds checkpoint-2; give resume_from_checkpoint"):
        train_drafter(settings(tmp_path), tiny_dit())
    with pytest.raises(ValueError, match=r"of another configuration: learning_rate 0.0001, here 0.1; window 4, here 5"):
        train_drafter(settings(tmp_path, window=5, learning_rate=0.1, resume_from_checkpoint="latest"), tiny_dit())
    with pytest.raises(ValueError, match=r"of another configuration: model '\w+', here '\w+'"):
        train_drafter(settings(tmp_path, resume_from_checkpoint="latest"), tiny_dit(num_classes=11))
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint is 'checkpoint-9'"):
        train_drafter(settings(tmp_path, resume_from_checkpoint="checkpoint-9"), tiny_dit())
    file = tmp_path / "checkpoint-2" / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"training\.safetensors' is missing, corrupt or truncated"):
        train_drafter(settings(tmp_path, resume_from_checkpoint="latest"), tiny_dit())


def test_old_checkpoints_go(tmp_path: Path) -> None:
    train_drafter(settings(tmp_path, checkpointing_steps=1, checkpoints_total_limit=2), tiny_dit())
    assert sorted(path.name for path in tmp_path.glob("*check*")) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize(
    ("checkpointing_steps", "kept"), [(1, "last good checkpoint is '.*checkpoint-1'"), (9, "no checkpoint")]
)
def test_a_loss_that_is_not_finite_stops_the_run(checkpointing_steps: int, kept: str, tmp_path: Path) -> None:
    config = settings(tmp_path, learning_rate=1e30, checkpointing_steps=checkpointing_steps)
    with pytest.raises(FloatingPointError, match=rf"is (nan|inf) at training step 2; .*{kept}"):
        train_drafter(config, tiny_dit())
    assert not (tmp_path / WEIGHTS).exists()


# --- settings and the saved drafter


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "hold"}, "base is 'hold'; allowed are 'gains', 'hold-x0', 'none'"),
        ({"states": "noised"}, "states is 'noised' with base 'gains', which learn from a run; allowed is 'windows'"),
        ({"window": 1}, "window is 1; allowed is 2 or more"),
        ({"subset": 0.0}, "subset is 0.0; allowed is more than 0"),
        ({"label_dropout": 1.5}, "label_dropout is 1.5; allowed is 0 … 1"),
        ({"num_inference_steps": ()}, "num_inference_steps is empty"),
        ({"lr_scheduler": "steep"}, "lr_scheduler is 'steep'; allowed are 'linear'"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


def test_the_command_line_says_what_the_settings_say() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert DrafterTrainingConfig(**vars(parser.parse_args(["--output_dir", "x"]))) == DrafterTrainingConfig(output_dir="x")
    words = [
        "--output_dir=x",
        "--num_inference_steps",
        "250",
        "50",
        "--no-use_ema",
        "--sweeps=0",
        "--loss=mse",
        "--subset=1",
    ]
    config = DrafterTrainingConfig(**vars(parser.parse_args(words)))
    assert (config.num_inference_steps, config.use_ema, config.sweeps, config.loss, config.subset) == (
        (250, 50), False, 0, "mse", 1.0,
    )  # fmt: skip


def test_the_drafter_is_saved_in_the_wanted_dtype(tmp_path: Path) -> None:
    drafter = train_drafter(settings(tmp_path, save_dtype="float16", max_train_steps=1), tiny_dit())
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {torch.float16}
    assert drafter.dtype == torch.float32  # as diffusers loads whatever is not asked for in another


def test_a_saved_drafter_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    drafter = free.FeatureDrafter.from_target(tiny_dit())
    drafter.save_pretrained(tmp_path)
    weights = tmp_path / WEIGHTS
    whole, config = weights.read_bytes(), tmp_path / "config.json"
    assert isinstance(drafter_of(str(tmp_path)), free.FeatureDrafter)
    weights.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match="cannot be loaded"):
        free.FeatureDrafter.from_pretrained(tmp_path)
    tensors = drafter.state_dict()
    save_file({name: value for name, value in tensors.items() if name != "fuse.bias"}, weights)
    with pytest.raises(ValueError, match=r"has 1 missing weights, 'fuse\.bias' for one"):
        free.FeatureDrafter.from_pretrained(tmp_path)
    save_file({**tensors, "fuse.bias": torch.zeros(3)}, weights)
    with pytest.raises(ValueError, match="cannot be loaded"):
        free.FeatureDrafter.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "DiTTransformer2DModel"}))
    with pytest.raises(ValueError, match="it is a DiTTransformer2DModel; allowed is a FeatureDrafter"):
        free.FeatureDrafter.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is a DiTTransformer2DModel; allowed is a FeatureDrafter"):
        drafter_of(str(tmp_path))


@pytest.mark.parametrize("base", [None, "gains"])
def test_the_drafter_compiles_as_one_graph(base: Any) -> None:
    drafter = free.FeatureDrafter.from_target(tiny_dit(), base=base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in drafter.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        images = 1 if base is None else 5
        inputs = (
            torch.randn(3, images, 8, 8),
            torch.rand(3) * 999,
            torch.rand(3),
            torch.randn(3, 32),
            torch.randn(3, 16, 32),
        )
    compiled = torch.compile(drafter, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for one, other in zip(compiled(*inputs), drafter(*inputs), strict=True):
            torch.testing.assert_close(one, other)


def test_a_full_disk_ends_the_run_with_what_was_written_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path, max_train_steps=4, checkpointing_steps=2)
    written = free.training.checkpoint.save_file

    def full(tensors: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-4" in str(file):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        written(tensors, file, *args, **kwargs)

    monkeypatch.setattr(free.training.checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"checkpoint of step 4 cannot be written to .*No space left on device"):
        train_drafter(config, tiny_dit())
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-2"]
    monkeypatch.undo()
    train_drafter(dataclasses.replace(config, resume_from_checkpoint="latest"), tiny_dit())
    assert (tmp_path / "checkpoint-4").is_dir()


def test_a_process_of_one_step_drafts_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"num_inference_steps is 1; allowed is an int, 2 or more, as the last step is never"
    ):
        settings(tmp_path, num_inference_steps=(1,))


def test_a_run_begins_with_the_weights_of_a_drafter_of_another_base(tmp_path: Path) -> None:
    torch.manual_seed(3)
    first = free.FeatureDrafter.from_target(tiny_dit(), base="hold-x0")
    torch.nn.init.normal_(first.to_output.weight, std=0.01)
    first.save_pretrained(tmp_path / "first")
    common = {"begin_with": str(tmp_path / "first"), "max_train_steps": 1, "use_ema": False}
    drafter = train_drafter(settings(tmp_path / "second", learning_rate=1e-9, **common), tiny_dit())
    assert drafter.base == "gains"
    for name, value in first.state_dict().items():
        torch.testing.assert_close(drafter.state_dict()[name], value, atol=1e-6, rtol=0.0)
    with pytest.raises(ValueError, match=r"begin_with is '.*first', whose weights do not fit this drafter"):
        train_drafter(settings(tmp_path / "third", base="none", **common), tiny_dit())
    with pytest.raises(ValueError, match="begin_with is 'nowhere', which is no folder"):
        train_drafter(settings(tmp_path / "third", **{**common, "begin_with": "nowhere"}), tiny_dit())


def test_a_model_is_not_written_over(tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"output_dir is .*, which holds a DiTTransformer2DModel; give another"):
        train_drafter(settings(tmp_path), tiny_dit())
