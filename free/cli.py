"""``free-dit``: the console command (a command called ``free`` would hide the operating system's own)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed with a message, 2 wrong usage, 3 the folder is of another
    configuration, 4 the disk failed, 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int | None = arguments.run(arguments)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"free-dit: {error}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        print("free-dit: interrupted", file=sys.stderr)
        return 130
    return code or 0


class _Parser(argparse.ArgumentParser):
    """Asks ``late`` for its arguments when it is used: what they are read from is slow to import."""

    late: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, *arguments: Any, **keywords: Any) -> Any:
        if self.late is not None:
            late, self.late = self.late, None
            late(self)
        return super().parse_known_args(*arguments, **keywords)


def _parser() -> argparse.ArgumentParser:
    from free.version import __version__

    parser = _Parser(prog="free-dit", description="Lossless speculative sampling for Diffusion Transformers.")
    parser.add_argument("--version", action="version", version=f"free-dit {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="draw ten digits step by step and speculatively, side by side",
        description="Loads the digits DiT that ships with the package, draws one sample of each class at a time by both "
        "samplers, prints a table and writes a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--steps", type=_positive, default=250, help="denoising steps S")
    demo.add_argument("--window", type=_window, default="auto", help="states evaluated in one round, W, or auto")
    demo.add_argument("--guidance-scale", type=float, default=1.5, help="classifier-free guidance")
    demo.add_argument(
        "--drafter", nargs="+", default=["gains", "learned"], metavar="DRAFTER",
        help="gains, hold-x0, hold-output, learned (the one that ships with the digits DiT), or a drafter's folder",
    )  # fmt: skip
    demo.add_argument("--per-class", type=_positive, default=1, help="samples of each class")
    demo.add_argument("--seed", type=int, default=0, help="seed of the first sample")
    demo.add_argument("--output", type=Path, default=Path("free-dit-demo.png"), help="where the picture goes")
    demo.add_argument(
        "--weights", type=Path, default=None, help="folder of another digits DiT; the package's own if left out"
    )
    demo.add_argument(
        "--retrain",
        action="store_true",
        help="train the digits DiT first, into --weights (or ./free-dit-digits); this is how the package's own were made",
    )
    demo.add_argument("--train-steps", type=_positive, default=None, help="training steps of --retrain, if not the usual")
    demo.set_defaults(run=_demo)

    _add_compare(commands)
    _add_train_drafter(commands)
    _add_sample(commands)
    _add_evaluate(commands)
    _add_check(commands)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from free.demo.run import run_demo

    run_demo(
        steps=arguments.steps,
        window=arguments.window,
        guidance_scale=arguments.guidance_scale,
        drafters=arguments.drafter,
        per_class=arguments.per_class,
        seed=arguments.seed,
        output=arguments.output,
        weights=arguments.weights,
        retrain=arguments.retrain,
        train_steps=arguments.train_steps,
    )


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare drafters against one target: efficiency, acceptance, |delta|, cost",
        description="Samples with every drafter, window, number of steps, guidance scale, process and relaxation, prints a "
        "table, writes a figure and appends a row for each configuration as soon as it is measured.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    compare.add_argument(
        "--model", type=Path, default=None, help="folder of a saved DiTTransformer2DModel; the digits DiT if left out"
    )
    left_out = argparse.SUPPRESS  # what was not said is not passed on
    compare.add_argument(
        "--samplers", nargs="+", default=left_out, metavar="SAMPLER",
        help="such as ddpm:250 2m-sde:15 2m-ode:10, instead of --steps: distance from --data over rounds",
    )  # fmt: skip
    compare.add_argument(
        "--drafters", nargs="+", default=left_out, metavar="DRAFTER",
        help="names, or folders of learned ones (default: gains hold-x0)",
    )  # fmt: skip
    compare.add_argument(
        "--windows", nargs="+", type=_positive, default=left_out, metavar="W",
        help="windows (default: 2 4 8 16 32 64; 8 of samplers)",
    )  # fmt: skip
    compare.add_argument(
        "--steps", nargs="+", type=_positive, default=left_out, metavar="S", help="denoising steps (default: 50 250)"
    )
    compare.add_argument("--guidance-scales", nargs="+", type=float, default=[1.5], metavar="SCALE", help="1 is no guidance")
    compare.add_argument(
        "--variance", nargs="+", default=["posterior"], metavar="NAME",
        help="of the process: posterior, beta, geometric, or learned (the model's own, averaged)",
    )  # fmt: skip
    compare.add_argument(
        "--stochasticity", nargs="+", type=float, default=[1.0], metavar="EPSILON", help="of the process; 1 is DDPM"
    )
    compare.add_argument(
        "--relaxation", nargs="+", type=float, default=[0.0], metavar="STRENGTH", help="of relaxed acceptance; 0 is exact"
    )
    compare.add_argument(
        "--uncertainty", default=left_out, help="what relaxation is guided by: residual or learned (default: residual)"
    )
    compare.add_argument(
        "--budget", type=float, default=left_out, help="total variation that a relaxed sample may spend, 0 to 1"
    )
    compare.add_argument(
        "--data", default=None, metavar="DATA",
        help="real data to judge the samples by: digits, or a .npz of images and labels; draws quality over rounds",
    )  # fmt: skip
    compare.add_argument("--samples", type=_positive, default=16, help="samples a configuration; classes take turns")
    compare.add_argument("--batch-size", type=_positive, default=16, help="samples drawn at once")
    compare.add_argument("--seed", type=int, default=0, help="seed of the first sample")
    compare.add_argument("--output", type=Path, default=Path("compare.png"), help="where the figure goes")
    compare.add_argument(
        "--results", type=Path, default=None, metavar="FILE",
        help="JSON-lines file that rows are appended to; benchmarks/results/compare.jsonl if left out and the folder exists",
    )  # fmt: skip
    compare.add_argument("--resume", action="store_true", help="skip the configurations that the results already hold")
    compare.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from free.evaluation.compare import compare

    compare(**_keywords(arguments))


def _add_train_drafter(commands: Any) -> None:
    train = commands.add_parser(
        "train-drafter",
        help="train a learned drafter for a DiT",
        description="Trains a FeatureDrafter for a frozen DiT and saves it. `accelerate launch -m free.cli train-drafter …` "
        "runs it on several GPUs. --base none --states noised is the paper's training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.late = _train_arguments
    train.set_defaults(run=_train_drafter)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from free.training.config import add_arguments

    add_arguments(parser)


def _train_drafter(arguments: argparse.Namespace) -> None:
    from free.training import DrafterTrainingConfig, train_drafter

    config = DrafterTrainingConfig(**_keywords(arguments))
    train_drafter(config)
    print(f"drafter: {config.output_dir}")


def _add_sample(commands: Any) -> None:
    sample = commands.add_parser(
        "sample",
        help="draw any number of samples into a folder, by any number of processes",
        description="Draws samples 0 … N-1 of a DiT into a folder. `torchrun --nproc-per-node R -m free.cli sample …` draws "
        "with R processes, a GPU each; the same command goes on where it was stopped, with as many processes as it likes. "
        "The files are the same whatever their number. Exit codes: 0 all samples are there, 1 failed with a message, 2 "
        "wrong usage, 3 the folder is of another configuration, 4 the disk is full or cannot be read or written, 130 "
        "interrupted; after 1, 4, 130 or a kill the same command goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model(sample, guidance_scale=1.5, steps=250)
    sample.add_argument("--output-dir", type=Path, required=True, help="the folder; made if it is not there")
    sample.add_argument("--num-samples", type=_positive, default=50_000, help="samples in all")
    sample.add_argument("--batch-size", type=_positive, default=64, help="samples drawn at once, a shard, by one process")
    sample.add_argument(
        "--sampler", choices=["speculative", "ancestral"], default="speculative",
        help="both draw from the same distribution",
    )  # fmt: skip
    sample.add_argument("--drafter", default="gains", help="a name, or a drafter's folder")
    sample.add_argument(
        "--window", type=_window, default="auto",
        help="states of a sample evaluated in one round, W; auto plans it once for the folder, by what rounds of a batch "
        "take: where a full batch fills the device that is mostly 1, the ancestral sampler",
    )  # fmt: skip
    sample.add_argument(
        "--labels", nargs="+", default=["uniform"], metavar="LABEL",
        help="uniform (drawn for each sample), balanced (all classes in turn), none (the null class), or ints taken in turn",
    )  # fmt: skip
    sample.add_argument(
        "--format", choices=["png", "npz", "latents"], default=None,
        help="00/000123.png, samples.npz, or safetensors of what the model makes; PNG if left out and there are images",
    )  # fmt: skip
    sample.add_argument("--decode-batch-size", type=_positive, default=8, help="samples that the VAE decodes at once")
    sample.add_argument(
        "--threads", type=_positive, default=1,
        help="of each process on a CPU; bits may depend on it, and more processes are faster than more threads",
    )  # fmt: skip
    sample.set_defaults(run=_sample)


def _sample(arguments: argparse.Namespace) -> None:
    import torch

    from free.drafters.loading import drafter_of
    from free.parallel.sharding import Place, sample_to_folder

    labels = _labels(arguments.labels)
    target, vae, device = _loaded(arguments)
    if device == "cpu":
        torch.set_num_threads(arguments.threads)
    drawn = sample_to_folder(
        target,
        arguments.output_dir,
        num_samples=arguments.num_samples,
        batch_size=arguments.batch_size,
        sampler=arguments.sampler,
        drafter=drafter_of(arguments.drafter, device) if arguments.sampler == "speculative" else arguments.drafter,
        window=arguments.window,
        class_labels=labels,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
        file_format=arguments.format,
        vae=vae,
        decode_batch_size=arguments.decode_batch_size,
    )
    if Place.from_environment().rank == 0:
        print(f"{drawn}\n{arguments.num_samples} samples: {arguments.output_dir}")


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="Fréchet distance, precision and recall of samples against images or statistics",
        description="Compares a folder or .npz of samples with a reference. With torch-fidelity's Inception weights the "
        "distance is the FID; without, it is of the features of a small network that is trained on the reference's labels, "
        "and no FID.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    evaluate.add_argument("samples", help="a folder of images, or a .npz of arr_0 (or, with --weights, of mu and sigma)")
    evaluate.add_argument(
        "reference", help="the same; without --weights it needs labels: digits, or a .npz of images and labels, or of arr_0 "
        "and arr_1",
    )  # fmt: skip
    evaluate.add_argument("--weights", type=Path, default=None, help="torch-fidelity's Inception file (.pth)")
    evaluate.add_argument("--batch-size", type=_positive, default=64, help="images that Inception sees at once")
    evaluate.add_argument("--device", default=None, help="Inception's: the GPU if there is one, else the CPU")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from free.evaluation.fidelity import evaluate

    print(evaluate(progress=True, **_keywords(arguments)))


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="test on your own model that speculative samples have the step-by-step sampler's law",
        description="Draws samples speculatively and step by step, tests that nothing tells them apart, and that the noise "
        "of each speculative step is what it should be along the way its draft was off. Prints p-values and what they mean. "
        "Exit codes: 0 passed, 1 not exact or failed with a message. A drafter of your own class is tested from Python: "
        "free.evaluation.check_exactness.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model(check, guidance_scale=1.5, steps=50)
    check.add_argument("--drafter", default="gains", help="a name, or a drafter's folder")
    check.add_argument("--window", type=_positive, default=8, help="states evaluated in one round, W")
    check.add_argument("--num-samples", type=_positive, default=256, help="of each sampler; classes take turns")
    check.add_argument("--batch-size", type=_positive, default=64, help="samples drawn at once")
    check.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from free.drafters.loading import drafter_of
    from free.evaluation.exactness import check_exactness

    target, _, device = _loaded(arguments)
    found = check_exactness(
        target,
        drafter_of(arguments.drafter, device),
        class_labels=range(target.null_class),
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        window=arguments.window,
        num_samples=arguments.num_samples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        progress=True,
    )
    print(found)
    return 0 if found.passed else 1


def _add_model(parser: argparse.ArgumentParser, *, guidance_scale: float, steps: int) -> None:
    """What all that load a model ask of it."""
    parser.add_argument(
        "--model", default=None,
        help="folder of a DiTTransformer2DModel or of a DiTPipeline, or a pipeline's name on the hub, whose scheduler says "
        "the process and whose VAE decodes; the digits DiT if left out",
    )  # fmt: skip
    parser.add_argument("--steps", type=_positive, default=steps, help="denoising steps S")
    parser.add_argument("--guidance-scale", type=float, default=guidance_scale, help="1 is no guidance")
    parser.add_argument("--seed", type=int, default=0, help="from which the key of each sample follows")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the model")
    parser.add_argument("--device", default=None, help="the GPU of the process's local rank if there is one, else the CPU")


def _loaded(arguments: argparse.Namespace) -> tuple[Any, Any, str]:
    """The target, its pipeline's VAE if there is one, and their device, of what :func:`_add_model` asked."""
    import torch

    from free.data.digits import weights_path
    from free.targets.loading import load_pipeline

    device = _device(arguments.device)
    model = str(weights_path()) if arguments.model is None else arguments.model
    return *load_pipeline(model, getattr(torch, arguments.dtype), device), device


def _keywords(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a command, which are the arguments of the function that it calls."""
    return {name: value for name, value in vars(arguments).items() if name != "run"}


def _device(word: str | None) -> str:
    from free.targets.loading import default_device

    device = default_device() if word is None else word
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


def _labels(words: Sequence[str]) -> str | list[int] | None:
    if len(words) == 1 and words[0] in ("uniform", "balanced", "none"):
        return None if words[0] == "none" else words[0]
    for word in words:
        if not word.isdecimal():
            raise ValueError(f"labels holds {word!r}; allowed is 'uniform', 'balanced' or 'none', or ints")
    return [int(word) for word in words]


def _window(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no int of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
