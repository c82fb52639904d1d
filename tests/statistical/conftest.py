"""What the statistical tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """The checks' many small operations gain nothing from threads, and lose much where cores are shared.

    The identities keep their threads: a reduction that is split among threads is what could break them.
    """
    threads = torch.get_num_threads()
    if "identities" not in request.module.__name__:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
