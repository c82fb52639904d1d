"""``free-dit``: the console command (a command called ``free`` would hide the operating system's own)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 done, 1 failed with a message, 2 wrong usage, 130 interrupted)."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"free-dit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("free-dit: interrupted", file=sys.stderr)
        return 130
    return 0


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
    compare.add_argument("--uncertainty", default="residual", help="what relaxation is guided by: residual or learned")
    compare.add_argument(
        "--budget", type=float, default=None, help="total variation that a relaxed sample may spend, 0 to 1"
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

    compare(**{name: value for name, value in vars(arguments).items() if name != "run"})


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

    config = DrafterTrainingConfig(**{name: value for name, value in vars(arguments).items() if name != "run"})
    train_drafter(config)
    print(f"drafter: {config.output_dir}")


def _window(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no int of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
