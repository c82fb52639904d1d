"""Fused operations on tensors for speculative sampling of diffusion models.

Every operation lives in a folder of its own: the public function, a plain torch reference and a Triton kernel with
the same signature. Randomness enters as seeds and step indices; per-step coefficients are whole tables, gathered inside by
step. This package knows tensors only and never imports :mod:`free`.
"""

from free_kernels.acceptance import Acceptance, acceptance, acceptance_from_means
from free_kernels.dispatch import IMPLEMENTATIONS
from free_kernels.finite import Finite, finite
from free_kernels.gain_correction import gain_correction
from free_kernels.gains import Scales
from free_kernels.householder import householder
from free_kernels.learn_gains import Knowledge, learn_gains
from free_kernels.patches import Patches
from free_kernels.philox import LATENT_STREAM, NOISE_STREAM, TEST_STREAM, normal, philox, uniform
from free_kernels.posterior import posterior, posterior_with_memory
from free_kernels.posterior.reference import effective_output, guided, x0_estimate
from free_kernels.propose import HOLD_DRAFTS, Proposal, propose
from free_kernels.propose.reference import anchor_index
from free_kernels.relaxation import RelaxedCost, relaxed_cost, relaxed_tau
from free_kernels.span import Span, span
from free_kernels.table import StepTable
from free_kernels.tally import tally
from free_kernels.verify import Verification, verify

__all__ = [
    "HOLD_DRAFTS",
    "IMPLEMENTATIONS",
    "LATENT_STREAM",
    "NOISE_STREAM",
    "TEST_STREAM",
    "Acceptance",
    "Finite",
    "Knowledge",
    "Patches",
    "Proposal",
    "RelaxedCost",
    "Scales",
    "Span",
    "StepTable",
    "Verification",
    "acceptance",
    "acceptance_from_means",
    "anchor_index",
    "effective_output",
    "finite",
    "gain_correction",
    "guided",
    "householder",
    "learn_gains",
    "normal",
    "philox",
    "posterior",
    "posterior_with_memory",
    "propose",
    "relaxed_cost",
    "relaxed_tau",
    "span",
    "tally",
    "uniform",
    "verify",
    "x0_estimate",
]
