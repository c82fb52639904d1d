"""Every planted bug is caught. That the same checks pass on the package as it is, is asserted in ``test_law.py``."""

from __future__ import annotations

import pytest

from tests.statistical import mutations
from tests.statistical.checks import CHECKS
from tests.statistical.mutation_gate import hunt, main


@pytest.mark.parametrize("bug", mutations.MUTATIONS)
def test_planted_bug_is_caught(bug: str) -> None:
    findings = hunt(bug)
    assert any(finding.caught for finding in findings), findings


def test_every_check_that_the_gate_names_exists() -> None:
    assert {check for mutation in mutations.MUTATIONS.values() for check in mutation.checks} <= set(CHECKS)


def test_a_planted_bug_is_taken_out_again() -> None:
    import free.sampling.noise
    from free_kernels import philox, uniform

    before = free.sampling.noise.uniform, philox
    with mutations.MUTATIONS["5 % of rejections leaked"].plant():
        pass
    assert (free.sampling.noise.uniform, philox) == before
    assert free.sampling.noise.uniform is uniform


def test_the_table_of_one_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bug", "budget spent by each test anew"]) == 0
    assert "1 bugs planted" in capsys.readouterr().out
