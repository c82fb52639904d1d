"""The checks: plain functions that return {name: p-value}. pytest asserts on them, the mutation gate reuses them.

How many numbers. Kolmogorov-Smirnov rejects at 1e-6 where the sup distance of the distribution functions exceeds
2.7 / sqrt(n); to fall short of that with probability below 1e-6 too, the true distance must be twice that:
n >= 29 / distance².
The weakest biases that have to be seen, at |delta| = 1.5, where 55 % of the drafts are rejected:

- 5 % of rejections leaked: 2.7 % of the mass moves across delta / 2, a distance of 0.027: n >= 4e4.
- std off by 3 % on the 55 % of steps that verification settles: |z|² of D = 6 scales by 1.06 there, a distance of
  0.55 * 0.06 * max(x f(x)) = 0.55 * 0.06 * 0.69 = 0.023: n >= 5.5e4. Its sum of squares has a relative error of
  sqrt(2 / (6 n)) against a bias of 0.033: 10 errors at n = 3.1e4.

Hence 1e5 rows of one step, and chains of n samples with n * (S - 1) >= 7e4 innovations.

Some bugs are of a call and not of a step, and thousands of samples a call thin them out or cannot have them at all: rows
that share what is drawn ahead, a choice made once for a batch. Such cases call the sampler 30 to 100 times with one or two
samples, of more steps than are drawn ahead. n is 3e3 to 4e3 there, which sees a distance of 0.1; but a bug of this kind is
not weak: one noise that two steps share moves their product's mean by 1, so 30 such pairs of D = 6 among 3e3 are 10 errors.

Relaxed runs are judged by means of sums a sample. The third moment is 0.2 nats of 1.9 in a test at |delta| = 2, tau = 0.02,
0.07 of its standard deviation: 16 errors in 6000 samples of 8 tests. A budget that each test is held to anew lets through
about four times as much in the first window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from tests.statistical import engine, keys
from tests.statistical.cases import CASES, RELAXED
from tests.statistical.certificate import certificate
from tests.statistical.chains import chain
from tests.statistical.laws import PValues
from tests.statistical.one_step import one_step
from tests.statistical.streams import keys_of_a_seed, streams

CHECKS: dict[str, Callable[[], PValues]] = {
    "streams": streams,
    "keys of a seed": keys_of_a_seed,
    **{f"one step, {form}": functools.partial(one_step, form) for form in ("plain", "guided", "clipped")},
    **{f"chain: {name}": functools.partial(chain, name) for name in CASES},
    **{f"certificate: {name}": functools.partial(certificate, name) for name in RELAXED},
    **keys.CHECKS,
    **engine.CHECKS,
}
