"""The comparison of drafters: rows, table, figure, resuming, and what is refused before any work is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel

import free
import free.evaluation.compare
from free.data.digits import weights_path
from free.drafters.loading import drafter_of
from free.evaluation.compare import compare
from free.evaluation.quality import Judge, load_data
from free.evaluation.report import table
from free.evaluation.rows import ROOT, append_row, command, read_rows
from free.targets.loading import fingerprint, load_target

PNG = b"\x89PNG\r\n\x1a\n"


pytestmark = pytest.mark.filterwarnings("error::UserWarning:free")


@pytest.fixture
def folder(tmp_path: Path, dit: DiTTransformer2DModel) -> Path:
    dit.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def small(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a run of a second: four configurations. Away from the checkout and its results."""
    monkeypatch.chdir(tmp_path)
    return {
        "model": folder,
        "drafters": ["hold-x0", "hold-output"],
        "windows": [2, 3],
        "steps": [8],
        "samples": 3,
        "batch_size": 2,
        "output": tmp_path / "compare.png",
        "results": tmp_path / "compare.jsonl",
        "progress": False,
    }


def test_rows_agree_with_the_statistics_of_the_same_runs(small: dict[str, Any], dit: DiTTransformer2DModel) -> None:
    rows = compare(**{**small, "batch_size": 3}, seed=7)
    assert [(row["drafter"], row["window"]) for row in rows] == [
        ("hold-x0", 2), ("hold-x0", 3), ("hold-output", 2), ("hold-output", 3),
    ]  # fmt: skip
    for row in rows:
        stats = free.speculative_sample(
            dit, row["drafter"], class_labels=[0, 1, 2], seed=[7, 8, 9], num_inference_steps=8, window=row["window"],
            guidance_scale=1.5,
        ).stats  # fmt: skip
        assert row["parallel_efficiency"] == pytest.approx(stats.parallel_efficiency)
        assert row["standard_error"] == pytest.approx(stats.efficiency_per_sample.std(ddof=1) / 3**0.5)
        assert row["rounds"] == pytest.approx(stats.rounds.mean())
        assert row["acceptance_rate"] == pytest.approx(stats.acceptance_rate)
        assert row["tested_by_step"] == stats.tested.tolist()
        assert row["accepted_by_step"] == stats.accepted.tolist()
        assert row["mean_delta"] == pytest.approx(stats.delta_sum.sum() / stats.tested.sum(), rel=1e-3)
        for given, expected in zip(row["mean_delta_by_step"], stats.to_dict()["mean_delta"], strict=True):
            assert given == (None if expected is None else pytest.approx(expected, rel=1e-3, abs=1e-3))


def test_rows_are_json_with_their_circumstances(small: dict[str, Any]) -> None:
    rows = compare(**small)
    lines = small["results"].read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    for row in rows:
        assert {"time", "device", "threads", "python", "torch", "diffusers", "cuda", "revision", "command"} <= set(row)
        assert row["benchmark"] == "compare"
        assert row["model"] == "model"
        assert (row["samples"], row["batch_size"], row["seed"], row["steps"], row["guidance_scale"]) == (3, 2, 0, 8, 1.5)
        assert row["drafter_parameters"] == 0
        assert row["drafter_flops"] == 0
        assert row["draft_milliseconds"] > 0
        assert row["target_milliseconds"] > 0


def test_the_table_says_what_the_rows_say(small: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    rows = compare(**small, guidance_scales=[1, 2])
    printed = capsys.readouterr().out
    assert printed.startswith(table(rows))
    cells = [line.split() for line in printed.splitlines() if line.strip().startswith("hold-")]
    assert len(cells) == len(rows) == 8
    for row, line in zip(rows, cells, strict=True):
        assert line[:5] == [
            row["drafter"], str(row["window"]), "8", f"{row['guidance_scale']:g}", f"{row['parallel_efficiency']:.2f}",
        ]  # fmt: skip
        assert line[6] == f"{row['standard_error']:.2f}"
        assert line[7] == f"{row['acceptance_rate']:.1%}"


def test_a_sample_is_the_same_in_any_batch(small: dict[str, Any]) -> None:
    wide = compare(**{**small, "batch_size": 16, "results": None})
    narrow = compare(**{**small, "batch_size": 1, "results": None})
    assert [row["rounds"] for row in wide] == [row["rounds"] for row in narrow]


def test_the_figure_is_written_and_no_rows_without_a_results_folder(small: dict[str, Any], tmp_path: Path) -> None:
    compare(**{**small, "results": None, "windows": [1, 3]})
    assert small["output"].read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.png", "model"]


def test_rows_go_to_the_checkouts_results(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    rows = compare(**{**small, "results": None, "drafters": ["hold-x0"]})
    assert read_rows(tmp_path / "benchmarks" / "results" / "compare.jsonl") == rows


# --- processes, relaxation and quality ------------------------------------------------------------------------------------


def test_rows_of_processes_and_relaxations_agree_with_their_runs(
    small: dict[str, Any], make_dit: Callable[..., DiTTransformer2DModel]
) -> None:
    dit = make_dit(out_channels=4)
    dit.save_pretrained(small["model"])
    small |= {"drafters": ["hold-output"], "windows": [3], "batch_size": 3, "guidance_scales": [1.0]}
    rows = compare(**small, variance=["beta", "learned"], stochasticity=[0.8, 1], relaxation=[0, 4], uncertainty="learned")
    assert [(row["variance"], row["stochasticity"], row["strength"]) for row in rows] == [
        (variance, epsilon, strength) for variance in ("beta", "learned") for epsilon in (0.8, 1) for strength in (0, 4)
    ]
    learned = free.average_learned_variance(dit, 8, class_labels=range(5))
    for row in rows:
        variance = learned if row["variance"] == "learned" else row["variance"]
        process = free.ReverseProcess.ddpm(8, variance=variance, stochasticity=row["stochasticity"])
        relaxation = free.Relaxation(row["strength"], "learned")
        stats = free.speculative_sample(
            dit, "hold-output", class_labels=[0, 1, 2], seed=[0, 1, 2], process=process, window=3, relaxation=relaxation
        ).stats
        assert row["rounds"] == pytest.approx(stats.rounds.mean())
        assert row["total_variation_bound"] == pytest.approx(stats.total_variation_bound, rel=1e-4)
        assert (row["total_variation_bound"] > 0) == (row["strength"] > 0)
        assert row["total_variation_limit"] == pytest.approx(stats.total_variation_limit, rel=1e-4)
        assert (row["total_variation_limit"] > 0) == (row["strength"] > 0)
        assert row["saved_rejections"] == pytest.approx(stats.saved_rejections.mean())
        assert row["uncertainty"] == ("learned" if row["strength"] else None)


def test_rows_from_before_the_choice_are_known(small: dict[str, Any]) -> None:
    small |= {"drafters": ["hold-x0"], "windows": [2]}
    (row,) = compare(**small)
    old = {
        name: value for name, value in row.items() if name not in ("variance", "stochasticity", "strength", "uncertainty")
    }
    small["results"].write_text(json.dumps(old) + "\n")
    assert compare(**small, resume=True) == [old]


def test_samples_are_judged_and_quality_is_drawn(small: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    small |= {"model": None, "drafters": ["hold-x0"], "windows": [1, 3], "samples": 12, "batch_size": 12}
    rows = compare(**small, relaxation=[0, 2], data="digits")
    # a window of one has nothing to relax
    assert [(row["window"], row["strength"]) for row in rows] == [(1, 0), (3, 0), (3, 2)]
    judge = Judge(*load_data("digits"))
    samples = free.ancestral_sample(
        load_target(weights_path()),
        class_labels=[i % 10 for i in range(12)],
        seed=list(range(12)),
        num_inference_steps=8,
        guidance_scale=1.5,
    ).samples
    assert rows[0]["energy_distance"] == pytest.approx(judge(samples).energy_distance, rel=1e-3)
    assert rows[0]["frechet_distance"] == pytest.approx(judge(samples).frechet_distance, rel=1e-3)
    assert {row["data_fingerprint"] for row in rows} == {judge.fingerprint}
    printed = capsys.readouterr().out
    header = next(line for line in printed.splitlines() if line.startswith("drafter"))
    assert header.split()[-7:] == ["TV", "at", "most", "TV", "limit", "energy", "Fréchet"]
    assert small["output"].read_bytes().startswith(PNG)


# --- resuming -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_is_resumed(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = free.evaluation.compare.measure
    measured: list[tuple[str, int]] = []

    def interrupted(*arguments: Any) -> dict[str, Any]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        return counted(*arguments)

    def counted(target: Any, configuration: Any, *arguments: Any) -> dict[str, Any]:
        measured.append((configuration.contender.word, configuration.window))
        return measure(target, configuration, *arguments)

    monkeypatch.setattr(free.evaluation.compare, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(**small)
    before = read_rows(small["results"])
    assert len(before) == 2
    assert not small["output"].exists()

    monkeypatch.setattr(free.evaluation.compare, "measure", counted)
    rows = compare(**small, resume=True)
    assert measured == [("hold-x0", 2), ("hold-x0", 3), ("hold-output", 2), ("hold-output", 3)]
    assert rows[:2] == before
    assert read_rows(small["results"]) == rows
    assert small["output"].exists()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"samples": 2},
        {"batch_size": 3},
        {"guidance_scales": [2.0]},
        {"steps": [9]},
        {"variance": ["beta"]},
        {"stochasticity": [0.8]},
        {"relaxation": [1.0]},
    ],
)
def test_another_configuration_is_not_taken_for_a_known_one(small: dict[str, Any], change: dict[str, Any]) -> None:
    small |= {"drafters": ["hold-x0"], "windows": [2]}
    compare(**small)
    compare(**{**small, **change}, resume=True)
    assert len(read_rows(small["results"])) == 2


def test_another_model_is_not_taken_for_a_known_one(
    small: dict[str, Any], make_dit: Callable[..., DiTTransformer2DModel]
) -> None:
    small |= {"drafters": ["hold-x0"], "windows": [2]}
    compare(**small)
    make_dit(seed=1).save_pretrained(small["model"])
    compare(**small, resume=True)
    first, second = read_rows(small["results"])
    assert first["model_fingerprint"] != second["model_fingerprint"]


def test_without_resume_everything_is_measured_again(small: dict[str, Any]) -> None:
    small |= {"drafters": ["hold-x0"], "windows": [2]}
    compare(**small)
    compare(**small)
    assert len(read_rows(small["results"])) == 2


# --- the cost of target and drafter -------------------------------------------------------------------------------------


def test_flops_and_parameters_of_a_drafter_that_is_a_model(
    small: dict[str, Any], dit: DiTTransformer2DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free.evaluation.compare, "drafter_of", lambda word, device: free.drafters.ModelDrafter(dit))
    first, second = compare(**{**small, "drafters": ["itself"]})
    # W-1 drafts by a copy of the target cost W-1 evaluations of it, and its drafts are all accepted
    assert first["drafter_flops"] == first["target_flops"] > 0
    assert second["drafter_flops"] == 2 * second["target_flops"]
    assert first["drafter_parameters"] == first["target_parameters"] == sum(p.numel() for p in dit.parameters())
    assert first["acceptance_rate"] > 0.99
    assert first["drafter_fingerprint"] is not None


def test_attention_counts_as_work(folder: Path) -> None:
    """Linear layers on 16 tokens alone come to less: q @ k and the weights @ v are 2 * 16 * 16 * 16 each, in two blocks."""
    target = load_target(folder)
    from torch.utils.flop_counter import FlopCounterMode

    states, timestep, labels = torch.zeros(1, 2, 8, 8), torch.tensor([5]), {"class_labels": torch.tensor([1])}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        target.evaluate(states, timestep, labels, False)
    without_attention = sum(
        count for name, count in counter.get_flop_counts()["Global"].items() if "addmm" in str(name) or "conv" in str(name)
    )
    with torch.no_grad(), free.evaluation.measure._Flops() as flops:
        target.evaluate(states, timestep, labels, False)
    assert flops.total == without_attention + 2 * 2 * (2 * 16 * 16 * 16)


def test_a_held_copy_of_the_target_is_no_part_of_the_drafter(folder: Path) -> None:
    target = load_target(folder)
    drafter = drafter_of("hold-x0")
    drafter.embedding = target.transformer  # type: ignore[attr-defined]
    drafter.scale = torch.ones(3)  # type: ignore[attr-defined]
    assert [tensor.numel() for tensor in free.evaluation.measure.learned_tensors(drafter, target)] == [3]


def test_the_fingerprint_follows_the_weights_and_not_the_folder(
    tmp_path: Path, make_dit: Callable[..., DiTTransformer2DModel]
) -> None:
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        make_dit(seed=seed).save_pretrained(tmp_path / name)
    a, b, c = (fingerprint(load_target(tmp_path / name)) for name in "abc")
    assert a == b != c


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drafters": []}, "drafters is empty"),
        ({"windows": []}, "windows is empty"),
        ({"steps": []}, "steps is empty"),
        ({"guidance_scales": []}, "guidance_scales is empty"),
        ({"drafters": ["hold-x0", "hold"]}, "drafter is 'hold'; known are"),
        ({"windows": [2, 0]}, "windows holds 0"),
        ({"steps": [8, 1001]}, "num_inference_steps is 1001"),
        ({"guidance_scales": [0.5]}, "guidance_scales holds 0.5"),
        ({"guidance_scales": [float("nan")]}, "guidance_scales holds nan"),
        ({"samples": 0}, "samples holds 0"),
        ({"batch_size": 0}, "batch_size holds 0"),
        ({"model": Path("no-such-folder")}, "no model in 'no-such-folder'"),
        ({"output": Path("no-such-folder/a.png")}, "output is .*folder does not exist"),
        ({"output": Path("a.mp3")}, r"output is 'a.mp3'; allowed are files that end in .*\.png"),
        ({"output": Path(".")}, "which is a folder"),
        ({"results": Path("no-such-folder/a.jsonl")}, "results is .*folder does not exist"),
        ({"results": None, "resume": True}, "give a results file"),
        ({"variance": []}, "variance is empty"),
        ({"variance": ["fixed"]}, "variance holds 'fixed'; known are 'posterior', 'beta', 'geometric', 'learned'"),
        ({"variance": ["learned"]}, "model has no learned-variance channels"),
        ({"stochasticity": [-0.5]}, "stochasticity is -0.5; allowed is 0 or more"),
        ({"relaxation": [-1.0]}, "relaxation is -1.0; allowed is 0"),
        ({"relaxation": [1.0], "budget": 2.0}, "budget is 2.0; allowed is a total variation"),
        ({"relaxation": [1.0], "uncertainty": "none"}, "uncertainty is 'none'; known are"),
        ({"relaxation": [1.0], "uncertainty": "learned"}, "uncertainty is 'learned': model has no learned-variance"),
        ({"data": "no-such-file.npz"}, "data is 'no-such-file.npz', which is not there"),
        ({"data": "images.png"}, "data is 'images.png'; allowed are 'digits' or a .npz file"),
        ({"data": "digits"}, r"data has images of shape \(1, 8, 8\); the model's samples are \(2, 8, 8\)"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    small: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free.evaluation.compare, "measure", lambda *_: pytest.fail("work was done"))
    with pytest.raises((ValueError, OSError), match=message):
        compare(**{**small, **change})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_holds_another_model_is_refused(tmp_path: Path) -> None:
    blocks = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    UNet2DModel(sample_size=8, layers_per_block=1, **blocks).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a UNet2DModel; allowed is a DiTTransformer2DModel"):
        load_target(tmp_path)


def test_a_broken_folder_is_refused(folder: Path) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_target(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_target(folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(ValueError, match="is no model's configuration"):
        load_target(folder)


def test_weights_that_are_missing_are_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["proj_out_2.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"proj_out_2\.weight"):
        load_target(folder)


def test_the_command_of_a_row_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--output", "/home/me/a.png", "--results=/home/me/b", f"{ROOT}/benchmarks/c", "rows/d", "x/y", "fresh:/me/e"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/free-dit", "compare", *given])
    assert command() == "free-dit compare --output a.png --results=b benchmarks/c rows/d x/y fresh:e"


def test_a_line_that_is_no_row_is_named(small: dict[str, Any]) -> None:
    append_row(small["results"], {"benchmark": "another"})
    with small["results"].open("a") as file:
        file.write('{"benchmark": \n')
    with pytest.raises(ValueError, match=r"compare\.jsonl' holds no JSON object in line 2"):
        compare(**small, resume=True)


def test_words_for_fresh_noise_and_sweeps(small: dict[str, Any], dit: DiTTransformer2DModel, tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    free.FeatureDrafter.from_target(dit, base="hold-x0").save_pretrained(trained)
    assert drafter_of(f"{trained}:sweeps=3").sweeps == 3
    assert drafter_of("fresh:hold-x0").name == "hold-x0, fresh noise"
    words = ["hold-x0", "fresh:hold-x0", str(trained), f"fresh:{trained}:sweeps=0"]
    rows = compare(**{**small, "windows": [4], "drafters": words})
    assert [row["drafter"] for row in rows] == ["hold-x0", "fresh:hold-x0", "trained", "fresh:trained:sweeps=0"]
    parameters = [row["drafter_parameters"] for row in rows]
    assert parameters[:2] == [0, 0]
    assert parameters[2] == parameters[3] > 0
    # untrained it drafts as hold-x0 does, once in the whole window or a step at a time
    efficiency = [row["parallel_efficiency"] for row in rows]
    assert efficiency[2] == efficiency[0]
    assert efficiency[3] == efficiency[1]


@pytest.mark.parametrize("word", ["hold-x0:sweeps=1", "fresh:hold-x0:sweeps=1"])
def test_only_a_trained_drafter_has_sweeps(word: str) -> None:
    with pytest.raises(ValueError, match="allowed is :sweeps=N after the folder of a trained drafter"):
        drafter_of(word)


def test_sweeps_are_a_number(dit: DiTTransformer2DModel, tmp_path: Path) -> None:
    free.FeatureDrafter.from_target(dit).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sweeps=many"):
        drafter_of(f"{tmp_path}:sweeps=many")


def test_a_pipelines_folder_is_told_where_its_model_is(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model is '.*', which is a pipeline; give '.*transformer', its DiT"):
        load_target(tmp_path)
