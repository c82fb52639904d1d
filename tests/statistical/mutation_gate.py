"""The mutation gate: ``python -m tests.statistical.mutation_gate`` plants each bug and fails unless a check sees it.

``--bug`` and the names of bugs, in quotes, plant those only.

A suite that passes says little unless it fails on a wrong sampler. Every bug must be rejected at p < 1e-6 by one check at
least, and the same checks must pass on the package as it is.
"""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import dataclass

import torch

from tests.statistical.checks import CHECKS
from tests.statistical.laws import BUDGET, PValues
from tests.statistical.mutations import MUTATIONS


@dataclass(frozen=True)
class Finding:
    """The sharpest hypothesis of one check against one bug."""

    bug: str
    check: str
    hypothesis: str
    p_value: float

    @property
    def caught(self) -> bool:
        return self.p_value < BUDGET


@functools.cache
def unmutated(check: str) -> PValues:
    """p-values of the package as it is; the tests of the law and the gate share them."""
    return CHECKS[check]()


def hunt(bug: str) -> list[Finding]:
    """Runs the bug's checks with the bug planted, then all others if it escaped them."""
    findings = []
    listed = MUTATIONS[bug].checks
    for check in (*listed, *(name for name in CHECKS if name not in listed)):
        if check not in listed and any(finding.caught for finding in findings):
            break
        with MUTATIONS[bug].plant():
            p_values = CHECKS[check]()
        # NaN means that the bug left nothing to test, which is not a catch
        hypothesis = min(p_values, key=lambda name: p_values[name] if p_values[name] == p_values[name] else 1.0)
        findings.append(Finding(bug, check, hypothesis, p_values[hypothesis]))
    return findings


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 if a bug escaped or a check rejects the package as it is."""
    parser = argparse.ArgumentParser(description="Plants each bug and fails unless a check sees it.")
    parser.add_argument("--bug", nargs="+", choices=MUTATIONS, default=list(MUTATIONS), metavar="BUG", help="only these")
    bugs = parser.parse_args(arguments).bug
    torch.set_num_threads(1)  # many small operations, on cores that are often shared
    failures = []
    print(f"{'planted bug':<44}{'check':<58}{'sharpest hypothesis':<46}p-value")
    for bug in bugs:
        findings = hunt(bug)
        for finding in findings:
            verdict = "" if finding.caught else "   not seen here"
            print(f"{finding.bug:<44}{finding.check:<58}{finding.hypothesis:<46}{finding.p_value:.1e}{verdict}", flush=True)
        if not any(finding.caught for finding in findings):
            failures.append(f"{bug}: escaped every check")
    used = dict.fromkeys(check for bug in bugs for check in MUTATIONS[bug].checks)
    print(f"\n{'without a bug':<44}{'check':<58}{'least of its hypotheses':<46}p-value")
    for check in used:
        p_values = unmutated(check)
        hypothesis = min(p_values, key=p_values.__getitem__)
        print(f"{'':<44}{check:<58}{hypothesis:<46}{p_values[hypothesis]:.1e}", flush=True)
        if not p_values[hypothesis] >= BUDGET:
            failures.append(f"{check}: rejects the package as it is ({hypothesis})")
    print("\n" + ("\n".join(failures) or f"{len(bugs)} bugs planted, every one caught at p < {BUDGET:.0e}"))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
