"""Which pipelines of the installed diffusers may be speculated: ``python -m tests.pipelines.zoo [name …]``.

Checks every case of this folder by :func:`free.check_pipeline`, and the check by bugs that are planted. Without names it
writes the table of ``docs/pipelines.md``.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

import free
from free.pipelines.refusals import ARGUMENTS, PERTURBED, PIPELINES
from tests.pipelines.cases import CASES
from tests.pipelines.parts import Case
from tests.pipelines.planted import BUGS, planted

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
BEGIN, END = "<!-- made by python -m tests.pipelines.zoo -->", "<!-- end -->"


@dataclass(frozen=True)
class Row:
    """What was found of one case."""

    case: Case
    scheduler: str
    check: free.PipelineCheck
    wrong: float
    """The least error that a planted bug showed."""

    def cells(self) -> tuple[str, ...]:
        works = "works" if self.case.mode == "ragged" else f'works, `mode="{self.case.mode}"`'
        verdict = works if self.check.passed else f"refused: {self.check.refused}" if self.check.refused else "differs"
        error = f"{self.check.worst_error:.1e} of {self.check.scale:.1f}"
        return self.case.family, f"`{self.case.name}`", self.scheduler, verdict, error, f"{self.wrong:.1e}", self.case.note


def examine(case: Case) -> Row:
    """Check a case, and how large an error its bugs would be."""
    pipe, call = case.make()
    check = free.check_pipeline(pipe, mode=case.mode, verbose=False, **call)
    wrong = []
    # with one sample there is no other
    for bug in BUGS if check.stats and len(check.stats.rounds) > 1 else BUGS[1:]:
        with planted(bug):
            again = free.check_pipeline(pipe, mode=case.mode, verbose=False, **call | {"num_inference_steps": 6})
            wrong.append(again.worst_error)
    return Row(case, type(pipe.scheduler).__name__.removesuffix("Scheduler"), check, min(wrong))


def page(rows: list[Row]) -> str:
    """The tables of ``docs/pipelines.md``."""
    import diffusers

    head = ("family", "pipeline", "scheduler", "", "worst error", "a bug shows", "")
    families = {row.case.family for row in rows}
    classes = {row.case.name.split(",")[0] for row in rows if row.check.passed}
    arguments = [(f"`{name}`", f"`{words}`", reason) for name, (_, words, reason) in ARGUMENTS.items()]
    refused = [(f"`{name}…`", reason) for name, reason in PIPELINES.items()] + [("`…PAG…`", PERTURBED)]
    lines = [
        f"diffusers {diffusers.__version__}: {len(classes)} classes of pipelines in {len(families)} families, tiny random",
        "networks in float32. *Worst error*: of a settled state's guided output against the untouched pipeline's, beside",
        "the largest output. *A bug shows*: the same error, the smaller of two, with every row's sample, or its timestep,",
        "planted wrong.",
        "",
        *_table(head, [row.cells() for row in rows]),
        "",
        "Refused by name:",
        "",
        *_table(("pipeline", "why"), refused),
        "",
        *_table(("argument", "allowed", "why"), arguments),
    ]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]


def main() -> None:
    """Examine and print; write the page if everything was examined."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(CASES)}")
    names = parser.parse_args().names
    from diffusers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in names or CASES:
        rows.append(examine(CASES[name]))
        print("  ".join(cell for cell in rows[-1].cells() if cell), flush=True)
    if not names:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{page(rows)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
