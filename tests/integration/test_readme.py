"""Every Python snippet of the README runs, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def snippets() -> list[tuple[int, str]]:
    """(line, source) of each ```python block."""
    text = README.read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, block.start()) + 2, block.group(1)) for block in blocks]


def test_the_readmes_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = snippets()
    assert found, "README.md has no ```python block"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for line, source in found:
        # blank lines in front, so that a traceback names the README's own lines
        exec(compile("\n" * (line - 1) + source, str(README), "exec"), namespace)
