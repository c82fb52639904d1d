"""The snippets of docs/samplers.md run."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "samplers.md"


def test_the_snippets_run() -> None:
    found = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(found) == 2
    namespace: dict[str, object] = {"__name__": "samplers"}
    for source in found:
        exec(compile(source, str(PAGE), "exec"), namespace)
