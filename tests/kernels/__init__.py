"""Tests of the Triton kernels: in Triton's interpreter on a machine without a GPU, compiled on one with it."""
