"""What all tests share: the rule for tests that need a GPU, and small models."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's interpreter stands in for a GPU in tests/kernels; it must be chosen before diffusers imports triton
    os.environ["TRITON_INTERPRET"] = "1"
    with suppress(ImportError):
        import triton  # noqa: F401
    del os.environ["TRITON_INTERPRET"]  # tests/kernels sets it again; everywhere else "triton" on CPU tensors is refused

from diffusers import DiTTransformer2DModel


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked ``gpu`` is skipped without CUDA, unless FREE_REQUIRE_GPU=1, which makes it fail instead; and one marked
    ``fidelity`` without torch-fidelity, unless FREE_REQUIRE_FIDELITY=1.
    """
    if item.get_closest_marker("fidelity") is not None:
        try:
            import torch_fidelity  # noqa: F401
        except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises the latter
            if os.environ.get("FREE_REQUIRE_FIDELITY") == "1":
                pytest.fail(f"FREE_REQUIRE_FIDELITY=1, but torch-fidelity cannot be imported: {error}", pytrace=False)
            pytest.skip("needs torch-fidelity, of the extra 'evaluate'")
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("FREE_REQUIRE_GPU") == "1":
        pytest.fail("FREE_REQUIRE_GPU=1, but there is no CUDA device", pytrace=False)
    pytest.skip("needs a CUDA device")


@pytest.fixture
def make_dit() -> Callable[..., DiTTransformer2DModel]:
    """Builds a DiT with random weights in eval mode: samples [2, 8, 8], 16 tokens of width 16, 5 classes."""

    def make(out_channels: int | None = None, num_classes: int = 5, seed: int = 0) -> DiTTransformer2DModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DiTTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=2,
                out_channels=out_channels,
                num_layers=2,
                sample_size=8,
                patch_size=2,
                num_embeds_ada_norm=num_classes,
            )
        return model.eval()

    return make


@pytest.fixture
def dit(make_dit: Callable[..., DiTTransformer2DModel]) -> DiTTransformer2DModel:
    return make_dit()
