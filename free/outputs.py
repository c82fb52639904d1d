"""Where results go, looked at before the work that they are of: a long run must not end in a path that cannot be written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_file(name: str, path: Path) -> None:
    """Raise an OSError that names the argument, unless ``path`` is a regular file, or can become one, and can be written."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name} is {str(path)!r}, and its folder does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"{name} is {str(path)!r}, which is a folder")
    new = not path.exists()
    if not new and not path.is_file():
        raise OSError(f"{name} is {str(path)!r}, which is no regular file")
    try:
        # what may be written is known to the system only: /proc is writable by its flags
        with tempfile.TemporaryFile(dir=path.parent) if new else path.open("ab"):
            pass
    except OSError as error:
        raise PermissionError(f"{name} is {str(path)!r}, which cannot be written: {error.strerror}") from error


def check_figure(name: str, path: Path) -> None:
    """As :func:`check_file`, of a file that matplotlib is to write; a ValueError for a format that it does not know."""
    from matplotlib.backend_bases import FigureCanvasBase

    check_file(name, path)
    allowed = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in allowed:
        raise ValueError(f"{name} is {str(path)!r}; allowed are files that end in .{', .'.join(allowed)}")


def check_folder(name: str, folder: Path, kind: str) -> None:
    """Raise an error that names the argument, unless something of ``kind`` can be written to ``folder`` without a loss.

    Args:
        name: of the argument.
        folder: may be there, empty or with what an earlier run of this kind left; is not made.
        kind: what its ``config.json`` says of itself, as ``_class_name``.

    Raises:
        OSError: it cannot be made, or not be written.
        ValueError: it holds something of another kind, which would be lost.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"{name} is {str(folder)!r}, which cannot be made: {error.strerror}") from error
    finally:
        for path in new:
            if path.exists():
                path.rmdir()
    if new:
        return
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{name} is {str(folder)!r}, which cannot be written")
    file = folder / "config.json"
    if not file.exists():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        found = None
    if found != kind:
        raise ValueError(f"{name} is {str(folder)!r}, which holds a {found or 'config.json of another kind'}; give another")


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Within this context a file of ``folder`` is written: what goes wrong, a full disk for one, is an OSError that says so.

    safetensors has an error of its own, which says nothing of where.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{what} cannot be written to {str(folder)!r}: {error}") from error
