"""``free-dit sample``: many processes, one folder, the same bytes whatever befell them."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline
from PIL import Image
from safetensors.numpy import load_file

import free
from free.cli import main
from free.demo import load_digits_dit
from free.parallel.sharding import Place, sample_to_folder
from free.parallel.shards import ShardFolder, StorageError
from tests.analytic import ElementwiseTarget, GaussianTarget

STEPS = 6
COMMON: dict[str, Any] = {
    "num_samples": 10,
    "batch_size": 4,
    "window": 3,
    "num_inference_steps": STEPS,
    "guidance_scale": 1.5,
    "progress": False,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> Any:
    return load_digits_dit()


@pytest.fixture(scope="module")
def finished(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that nothing is left to do in; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    sample_to_folder(digits, folder, **COMMON)
    return folder


def results(folder: Path) -> dict[str, bytes]:
    """The files that somebody wants, and the records of what they are."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.endswith(("claims", "windows.json"))}


def command(folder: Path, *more: str) -> list[str]:
    arguments = ["sample", "--output-dir", str(folder), "--steps", "20", "--window", "3", "--device", "cpu", *more]
    return [*arguments, "--num-samples", "44", "--batch-size", "4", "--seed", "3"]


def start(folder: Path, ranks: int, *more: str) -> list[subprocess.Popen[bytes]]:
    """Processes as torchrun would start them."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", "free.cli", *command(folder, *more)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]


@pytest.mark.slow
def test_two_processes_are_killed_and_three_go_on_and_the_bytes_are_those_of_one(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert main(command(alone)) == 0
    two = start(shared, 2)
    records = shared / "shards"
    while not list(records.glob("0*.json")) and all(process.poll() is None for process in two):
        time.sleep(0.01)
    for process in two:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = {path.name for path in records.glob("0*.json")}
    assert 1 <= len(before) < 11
    three = start(shared, 3)
    assert [process.wait(timeout=300) for process in three] == [0, 0, 0]
    assert results(shared) == results(alone)
    assert len(list(shared.glob("00/*.png"))) == 44
    assert not (records / "parts").exists()


@pytest.mark.slow
def test_torchrun_starts_it_and_a_rank_that_is_killed_costs_nothing_but_its_batch(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert main(command(alone, "--format", "npz")) == 0
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "free.cli"]
    run += command(shared, "--format", "npz")
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "44 samples" in done.stdout
    assert results(shared) == results(alone)
    with np.load(shared / "samples.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_0"].shape == (44, 8, 8, 1)
        assert arrays["arr_1"].shape == (44,)
    # without torchrun's agent, which ends all others, the first process takes over what a dead one had claimed
    orphaned = tmp_path / "orphaned"
    first, second = start(orphaned, 2)
    claims = orphaned / "shards" / "claims"
    while not claims.exists():
        time.sleep(0.01)
    second.kill()
    assert first.wait(timeout=300) == 0
    second.wait()
    assert {name for name in results(orphaned) if name.endswith(".png")} == {f"00/{i:06}.png" for i in range(44)}


def test_samples_are_those_of_the_sampler_itself(digits: Any, tmp_path: Path) -> None:
    drawn = sample_to_folder(digits, tmp_path, class_labels="balanced", file_format="latents", **COMMON)
    assert drawn.samples == 10
    assert 1 <= drawn.rounds / 10 <= STEPS
    parts = [load_file(path) for path in sorted(tmp_path.glob("latents/*.safetensors"))]
    assert [len(part["samples"]) for part in parts] == [4, 4, 2]
    assert np.concatenate([part["labels"] for part in parts]).tolist() == list(range(10))
    options = {name: COMMON[name] for name in ("window", "num_inference_steps", "guidance_scale")}
    whole = free.speculative_sample(digits, class_labels=range(10), seed=0, **options).samples
    # the same keys; of another batch size, so that bits may differ
    np.testing.assert_allclose(np.concatenate([part["samples"] for part in parts]), whole.numpy(), atol=1e-3)


@pytest.mark.parametrize("window", [1, 3])
def test_bits_do_not_depend_on_the_batch_where_the_model_does_not(window: int, tmp_path: Path) -> None:
    model = ElementwiseTarget()
    rows = []
    for size in (3, 5):
        folder = tmp_path / str(size)
        options = {**COMMON, "batch_size": size, "guidance_scale": 1.0, "window": window}
        sample_to_folder(model, folder, class_labels=None, shape=(6,), **options)
        rows.append(np.concatenate([load_file(path)["samples"] for path in sorted(folder.glob("latents/*"))]))
    assert rows[0].shape == (10, 6)
    assert (rows[0] == rows[1]).all()


def test_labels_follow_from_the_seed_and_the_number(digits: Any, tmp_path: Path) -> None:
    def labels(**options: Any) -> list[int]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        sample_to_folder(digits, folder, **{**COMMON, "num_inference_steps": 2, "sampler": "ancestral", **options})
        return [label for path in sorted(folder.glob("shards/0*.json")) for label in json.loads(path.read_text())["labels"]]

    uniform = labels()
    assert len(set(uniform)) > 3
    assert labels(batch_size=7) == uniform
    assert labels(num_samples=13)[:10] == uniform
    assert labels(seed=1) != uniform
    assert labels(class_labels=[7, 2]) == [7, 2] * 5


def test_png_holds_grey_pixels(digits: Any, finished: Path, tmp_path: Path) -> None:
    sample_to_folder(digits, tmp_path / "latents", file_format="latents", **COMMON)
    samples = np.concatenate([load_file(path)["samples"] for path in sorted((tmp_path / "latents").glob("latents/*"))])
    for i, sample in enumerate(samples):
        with Image.open(finished / "00" / f"{i:06}.png") as image:
            assert image.mode == "L"
            pixels = np.asarray(image).astype(float)
        np.testing.assert_allclose(pixels, np.clip(sample[0] / 2 + 0.5, 0, 1) * 255, atol=0.51)


def test_a_pipeline_brings_its_scheduler_and_decodes_in_chunks(digits: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(latent_channels=1, block_out_channels=(8,), norm_num_groups=4).eval()
    model = load_digits_dit()
    model.register_to_config(out_channels=1)  # the pipeline looks it up
    pipe = DiTPipeline(model, vae, DDPMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2"))
    pipe.save_pretrained(tmp_path / "pipe")
    arguments = [
        "--num-samples",
        "3",
        "--batch-size",
        "3",
        "--window",
        "2",
        "--steps",
        str(STEPS),
        "--decode-batch-size",
        "2",
    ]
    arguments += ["--labels", "3", "7", "--dtype", "bfloat16", "--device", "cpu", "--format", "npz"]
    assert main(["sample", "--model", str(tmp_path / "pipe"), "--output-dir", str(tmp_path / "out"), *arguments]) == 0
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        pixels, labels = arrays["arr_0"], arrays["arr_1"]
    assert labels.tolist() == [3, 7, 3]
    pipe.transformer = type(model).from_pretrained(tmp_path / "pipe" / "transformer", torch_dtype=torch.bfloat16).eval()
    common: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 1.5, "window": 2}
    latents = free.speculative_sample(pipe, class_labels=[3, 7, 3], seed=0, **common).samples
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    wanted = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    assert pixels.shape == (3, 8, 8, 3)
    assert wanted.std() > 1
    np.testing.assert_allclose(pixels, wanted, atol=0.6)


def test_automatic_windows_are_planned_once_for_the_folder(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []

    def plan(*arguments: Any, **options: Any) -> free.WindowPlan:
        plans.append(options)
        return free.WindowPlan(np.array([1, 2, 3, 2, 1, 1]))

    monkeypatch.setattr("free.parallel.recipe.plan_window", plan)
    options = {**COMMON, "window": "auto"}
    first = sample_to_folder(digits, tmp_path, place=Place(1, 2), **{**options})
    assert first.samples == 10  # nobody else came
    (tmp_path / "shards" / "000001.json").unlink()
    again = sample_to_folder(digits, tmp_path, **options)
    assert (again.samples, len(plans)) == (4, 1)
    assert len(plans[0]["class_labels"]) == 4
    other = tmp_path.with_name("given")
    sample_to_folder(digits, other, **{**options, "window": plan()})
    name = "00/000005.png"
    assert (tmp_path / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 1 here and 0 there"),
        ({"num_samples": 11}, "num_samples is 11 here and 10 there"),
        ({"batch_size": 5}, "batch_size is 5 here and 4 there"),
        ({"drafter": "hold-x0"}, "drafter is 'hold-x0 "),
        ({"sampler": "ancestral"}, "sampler is 'ancestral' here and 'speculative' there"),
        ({"process": free.ReverseProcess.ddpm(STEPS, variance="beta")}, "process is"),
        ({"class_labels": [1]}, "class_labels is [1] here and 'uniform' there"),
        ({"file_format": "npz"}, "format is 'npz' here and 'png' there"),
        ({"model": GaussianTarget.example(6)}, "model is"),
    ],
)
def test_another_configuration_is_refused(change: dict[str, Any], message: str, digits: Any, finished: Path) -> None:
    options = {**COMMON, "model": digits}
    before = results(finished)
    if "model" in change:
        change = {**change, "shape": (6,), "class_labels": None, "guidance_scale": 1.0}
    if "process" in change:
        change = {**change, "num_inference_steps": 250}
    with pytest.raises(ValueError, match="holds samples of another configuration") as error:
        sample_to_folder(output_dir=finished, **{**options, **change})
    assert message in str(error.value)
    assert error.value.exit_code == 3  # type: ignore[attr-defined]
    assert results(finished) == before


def test_a_foreign_manifest_is_refused_by_the_command_with_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["sample", "--num-samples", "2", "--output-dir", str(tmp_path), "--device", "cpu"]) == 3
    assert "manifest.json of another kind" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "fast"}, "sampler is 'fast'; allowed are 'speculative', 'ancestral'"),
        ({"window": 0}, "window is 0"),
        ({"drafter": "hold"}, "drafter is 'hold'"),
        ({"class_labels": "all"}, "class_labels is 'all'"),
        ({"class_labels": [10]}, "class_labels holds 10; allowed are 0 … 9"),
        ({"class_labels": []}, "class_labels is []"),
        ({"class_labels": None}, "guidance_scale is 1.5 without class_labels"),
        ({"file_format": "gif"}, "file_format is 'gif'; allowed are 'png', 'npz', 'latents'"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"decode_batch_size": 0}, "decode_batch_size is 0"),
        ({"seed": [1, 2]}, "seed is [1, 2]; allowed is an int"),
    ],
)
def test_wrong_arguments_make_no_folder(change: dict[str, Any], message: str, digits: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is below
        sample_to_folder(digits, tmp_path / "out", **{**COMMON, **change})
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_latents_without_a_vae_are_no_images(make_dit: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no VAE to decode them; allowed is 'latents'"):
        sample_to_folder(make_dit(), tmp_path / "out", file_format="png", **COMMON)
    sample_to_folder(make_dit(), tmp_path / "out", **COMMON)
    assert len(list((tmp_path / "out").glob("latents/*.safetensors"))) == 3


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "one bit", "missing"])
@pytest.mark.parametrize("name", ["00/000005.png", "shards/000001.json"])
def test_a_shard_that_is_not_whole_is_drawn_again(
    damage: Any, name: str, digits: Any, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    damage(folder / name)
    assert sample_to_folder(digits, folder, **COMMON).samples == 4
    assert results(folder) == results(finished)
    said = "shard 1 is not whole" in capsys.readouterr().err
    assert said == (damage is not Path.unlink or name.endswith("png"))
    assert sample_to_folder(digits, folder, **COMMON).samples == 0


def test_a_shard_that_is_damaged_before_the_npz_is_made_is_drawn_again(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from free.parallel.formats import Npz

    finish, damaged = Npz.finish, []

    def finish_once_damaged(self: Npz, folder: ShardFolder, num_samples: int) -> None:
        if not damaged:
            damaged.append(folder.root / "shards" / "000002.npy")
            truncate(damaged[0])
        finish(self, folder, num_samples)

    sample_to_folder(digits, tmp_path / "whole", file_format="npz", **COMMON)
    monkeypatch.setattr(Npz, "finish", finish_once_damaged)
    assert sample_to_folder(digits, tmp_path / "damaged", file_format="npz", **COMMON).samples == 12
    assert results(tmp_path / "damaged") == results(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["manifest.json", "samples.npz", "shards"]
    assert sample_to_folder(digits, tmp_path / "damaged", file_format="npz", **COMMON).samples == 0


def test_a_file_that_cannot_be_read_ends_with_its_name(digits: Any, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = results(finished)
    read = Path.read_bytes

    def fail(self: Path) -> bytes:
        if self.name == "000005.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(StorageError, match=r"000005\.png' cannot be read: Input/output error"):
            sample_to_folder(digits, finished, **COMMON)
    assert results(finished) == before


@pytest.mark.parametrize("file_format", ["png", "npz"])
def test_a_full_disk_ends_the_run_and_loses_nothing(
    file_format: str, digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_to_folder(digits, tmp_path / "whole", file_format=file_format, **COMMON)
    fsync, left = os.fsync, [10]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="the disk is full; what was finished is kept"):
            sample_to_folder(digits, tmp_path / "full", file_format=file_format, **COMMON)
    kept = len(list((tmp_path / "full" / "shards").glob("0*.json")))
    assert 1 <= kept < 3
    drawn = sample_to_folder(digits, tmp_path / "full", file_format=file_format, **COMMON)
    assert drawn.samples == 10 - 4 * kept
    assert results(tmp_path / "full") == results(tmp_path / "whole")


def test_a_folder_that_cannot_be_made_is_exit_code_4(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--num-samples", "2", "--output-dir", "/proc/nothing", "--device", "cpu"]) == 4
    assert "output_dir '/proc/nothing' cannot be made" in capsys.readouterr().err


def test_a_device_that_is_too_small_names_the_batch(digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("free.parallel.recipe.speculative_sample", full)
    with pytest.raises(ValueError, match="batch_size is 4, for which the device's memory is too small"):
        sample_to_folder(digits, tmp_path, **COMMON)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("", "", "no model in"),
        ("model_index.json", '{"_class_name": "FluxPipeline"}', "is a FluxPipeline; allowed are a DiTPipeline and"),
        ("model_index.json", '{"_class_name": "DiTPipeline"}', "cannot be loaded"),
        ("config.json", '{"_class_name": "UNet2DModel"}', "is a UNet2DModel; allowed is a DiTTransformer2DModel"),
    ],
)
def test_models_of_the_command(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / name).write_text(content)
    for verb in (["sample", "--output-dir", str(tmp_path / "out")], ["check"]):
        assert main([*verb, "--model", str(tmp_path / "model"), "--device", "cpu"]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "wrong"), [(["cat"], "cat"), (["uniform", "3"], "uniform"), (["3", "none"], "none")])
def test_labels_of_the_command(words: list[str], wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--num-samples", "2", "--output-dir", str(tmp_path / "out"), "--labels", *words]) == 1
    assert f"labels holds {wrong!r}; allowed is 'uniform', 'balanced' or 'none', or ints" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    source = (
        "import sys; from pathlib import Path; from free.parallel.shards import ShardFolder\n"
        "with ShardFolder(Path(sys.argv[1]), 3) as folder, folder.claim(1) as mine:\n"
        "    print(mine, flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", source, str(tmp_path)], **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == b"True\n"
        with ShardFolder(tmp_path, 3) as folder:
            with folder.claim(1) as mine, folder.claim(2) as free_one:
                assert (mine, free_one) == (False, True)
            other.kill()
            other.wait()
            with folder.claim(1) as mine:
                assert mine


def test_who_publishes_first_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with ShardFolder(tmp_path, 1) as folder:
        assert folder.publish("a", b"first")
        assert not folder.publish("a", b"second")
        monkeypatch.setattr(os, "link", no_links)
        assert folder.publish("b", b"first")
        assert not folder.publish("b", b"second")
        assert not list(folder.parts.iterdir())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"first"


def test_npz_is_read_and_written_in_parts(tmp_path: Path) -> None:
    from free.data.archives import ImageArchive, write_images

    images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
    write_images(tmp_path / "a.npz", [images[:3], images[3:]], images.shape, np.arange(7))
    with np.load(tmp_path / "a.npz") as arrays:
        assert (arrays["arr_0"] == images).all()
        assert arrays["arr_1"].tolist() == list(range(7))
    archive = ImageArchive(tmp_path / "a.npz")
    assert archive.shape == (7, 4, 5, 3)
    parts = list(archive.images(2))
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    assert (np.concatenate(parts) == images).all()
    for wrong in ([images], [images[:3]], [images.astype(np.int16)]):
        with pytest.raises(ValueError, match="images"):
            write_images(tmp_path / "b.npz", wrong, (8, 4, 5, 3))
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=images.astype(np.float32))
    (tmp_path / "c.npz").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="allowed is uint8"):
        ImageArchive(tmp_path / "c.npz")
    (tmp_path / "d.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is no \.npz of numbers"):
        ImageArchive(tmp_path / "d.npz")
