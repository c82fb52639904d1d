"""What ``free-dit sample`` takes beside sampling and decoding, and what several processes on one machine are worth.

``python -m benchmarks.bulk`` draws digits into a folder and appends a row to ``results/sampling.jsonl``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import RESULTS, write_row
from free.data.digits import load_digits_dit
from free.parallel.sharding import sample_to_folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--sampler", choices=["speculative", "ancestral"], default="ancestral")
    parser.add_argument("--window", type=int, default=1, help="of the speculative sampler")
    parser.add_argument("--format", choices=["png", "npz"], default="png")
    parser.add_argument(
        "--processes", type=int, default=None,
        help="time the command, started by torchrun with so many processes of one thread, loading included",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = {
        "num_samples": given.num_samples, "batch_size": given.batch_size, "sampler": given.sampler, "window": given.window
    }  # fmt: skip
    row: dict[str, Any] = {
        "benchmark": "bulk", "model": "digits", "steps": given.steps, "guidance_scale": given.guidance_scale,
        "format": given.format, "processes": given.processes, **settings,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        if given.processes is None:
            model = load_digits_dit()
            options = {"num_inference_steps": given.steps, "guidance_scale": given.guidance_scale}
            sample_to_folder(model, Path(scratch) / "warm", **{**settings, "num_samples": given.batch_size}, **options)
            drawn = sample_to_folder(model, Path(scratch) / "out", file_format=given.format, **settings, **options)
            row |= {"total_seconds": drawn.total_seconds, "overhead": drawn.overhead, **{
                f"{name}_seconds": seconds for name, seconds in drawn.seconds.items()
            }}  # fmt: skip
        else:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(given.processes),
            ]
            command += ["-m", "free.cli", "sample", "--output-dir", f"{scratch}/out", "--device", "cpu"]
            command += ["--format", given.format, "--sampler", given.sampler, "--window", str(given.window)]
            command += ["--steps", str(given.steps), "--guidance-scale", str(given.guidance_scale)]
            command += ["--num-samples", str(given.num_samples), "--batch-size", str(given.batch_size)]
            begin = time.perf_counter()
            subprocess.run(command, check=True)
            row["command_seconds"] = time.perf_counter() - begin  # loading included
    print(write_row("sampling", row, given.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
