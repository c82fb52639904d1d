"""The zoo."""

from __future__ import annotations

import sys
import traceback
import warnings

import torch

import free
from tests.pipelines import conditioned, images, videos  # noqa: F401
from tests.pipelines.parts import CASES

if __name__ == "__main__":
    import diffusers

    diffusers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, one in CASES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        try:
            pipe, call = one.make()
            free.check_pipeline(pipe, **call)
        except Exception as e:
            tb = traceback.extract_tb(e.__traceback__)[-1]
            print(name, type(e).__name__, str(e)[:300], tb.filename.split("site-packages/")[-1], tb.lineno)
            if sys.argv[1:]:
                traceback.print_exc()
