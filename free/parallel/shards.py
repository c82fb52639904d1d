"""A folder that any number of processes fill with shards: who draws which, what is there, and that it is whole.

No process talks to another, so that none waits for one that died. What is said is said by the folder:

- A shard is there once its record is, and the record is written last: every file goes to the disk under another name first,
  and then takes its own. A process that is killed leaves a name in ``shards/parts``, and nothing else.
- Who draws a shard holds a lock on one byte of ``shards/claims``, which the system takes away from a process that ends,
  however it ends. Locks save work and decide nothing: a shard that two processes draw is the same file twice, so that a file
  system without locks costs work only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_WRITERS = 16
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class StorageError(OSError):
    """A disk that cannot be written or read. What was finished is kept; the same command goes on from there."""

    exit_code = 4


class ShardFolder:
    """A folder of ``count`` shards.

    Args:
        root: made if it is not there.
        count: of the shards.

    Raises:
        StorageError: it cannot be made or written.
    """

    def __init__(self, root: Path, count: int) -> None:
        self.root, self.count = root, count
        self.parts = root / "shards" / "parts"
        self._claims: int | None = None
        self._mark = f"{socket.gethostname()}-{os.getpid()}"
        with self._storing("made"):
            self.parts.mkdir(parents=True, exist_ok=True)
            self._claims = os.open(root / "shards" / "claims", os.O_RDWR | os.O_CREAT, 0o666)

    def close(self) -> None:
        """Give up all claims."""
        if self._claims is not None:
            os.close(self._claims)
            self._claims = None

    def __enter__(self) -> ShardFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def done(self, number: int) -> bool:
        """Whether a shard is there."""
        return self._record(number).exists()

    def done_count(self) -> int:
        """How many are there."""
        with os.scandir(self.root / "shards") as entries:
            return sum(entry.name.endswith(".json") and entry.name[0].isdecimal() for entry in entries)

    def record(self, number: int) -> dict[str, Any]:
        """What :meth:`write` was told of a shard that is there; a StorageError if that cannot be read."""
        path = self._record(number)
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(f"{str(path)!r} cannot be read: {error}") from error

    @contextmanager
    def claim(self, number: int) -> Iterator[bool]:
        """Within this context no other process has a claim of this number, if the value is True.

        Args:
            number: a shard's, or one beyond the shards', for whatever else one process should do.
        """
        held = self._lock(number)
        try:
            yield held
        finally:
            if held:
                self._unlock(number)

    def write(self, number: int, files: Mapping[str, bytes], record: Mapping[str, Any]) -> None:
        """Write a shard's files, by their paths within the folder, and then its record, which names them.

        Raises:
            StorageError: the disk is full, or worse; nothing is left of what was not finished.
        """
        with ThreadPoolExecutor(_WRITERS) as pool:  # together they wait for the disk about as long as one does
            for written in [pool.submit(self._replace, self.root / name, content) for name, content in files.items()]:
                written.result()
        self._sync({(self.root / name).parent for name in files})
        named = {name: [len(content), hashlib.sha256(content).hexdigest()] for name, content in files.items()}
        text = json.dumps({**record, "files": named}, sort_keys=True) + "\n"
        self._replace(self._record(number), text.encode())
        self._sync({self._record(number).parent})

    def read(self, number: int) -> dict[str, bytes]:
        """A shard's files as they were written, by their paths within the folder.

        Raises:
            DamagedShardError: a file is not what was written; the shard is not there any longer, and can be drawn again.
            StorageError: a file cannot be read.
        """
        contents = {}
        try:
            files = {str(name): (int(size), str(digest)) for name, (size, digest) in self.record(number)["files"].items()}
        except (StorageError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(number, f"its record cannot be read ({error})") from error
        for name, (size, digest) in files.items():
            try:
                content = (self.root / name).read_bytes()
            except FileNotFoundError as error:
                raise self._damaged(number, f"{name} is missing") from error
            except OSError as error:
                raise StorageError(f"{str(self.root / name)!r} cannot be read: {error.strerror}; delete it to have it drawn "
                                   "again") from error  # fmt: skip
            if len(content) != size:
                raise self._damaged(number, f"{name} has {len(content)} bytes of {size}")
            if hashlib.sha256(content).hexdigest() != digest:
                raise self._damaged(number, f"{name} has other bytes than were written")
            contents[name] = content
        return contents

    def publish(self, name: str, content: bytes) -> bool:
        """Write a file that is not there yet, whole; False if another process was first, whose file stays."""
        path = self.root / name
        part = self._part(path, content)
        try:
            with self._storing("written"):
                try:
                    os.link(part, path)
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    if path.exists():
                        return False
                    part.replace(path)
            self._sync({path.parent})
            return True
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def part_of(self, name: str) -> Iterator[Path]:
        """A path to write a large file to, which takes its name when this context ends without an error."""
        part = self._new_part(name)
        try:
            with self._storing("written"):
                yield part
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
                part.replace(self.root / name)
                self._sync({self.root})
        finally:
            part.unlink(missing_ok=True)

    def drop(self, number: int) -> None:
        """Remove a shard's files, which something else holds by now. Its record stays, lest somebody draws it again."""
        for name in self.record(number)["files"]:
            (self.root / name).unlink(missing_ok=True)

    def drop_parts(self) -> None:
        """Remove what killed processes left."""
        shutil.rmtree(self.parts, ignore_errors=True)

    def _record(self, number: int) -> Path:
        return self.root / "shards" / f"{number:06}.json"

    def _damaged(self, number: int, what: str) -> DamagedShardError:
        with suppress(OSError):
            self._record(number).unlink(missing_ok=True)
        return DamagedShardError(f"shard {number} is not whole: {what}")

    def _replace(self, path: Path, content: bytes) -> None:
        with self._storing("written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._part(path, content).replace(path)

    def _part(self, path: Path, content: bytes) -> Path:
        """``content`` on the disk, under another name."""
        part = self._new_part(path.name)
        try:
            with self._storing("written"), part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            part.unlink(missing_ok=True)
            raise
        return part

    def _new_part(self, name: str) -> Path:
        self.parts.mkdir(parents=True, exist_ok=True)
        return self.parts / f"{self._mark}-{name}.part"  # no image, to those who look for images

    def _sync(self, folders: set[Path]) -> None:
        """Names too are on the disk only when it says so."""
        if os.name != "posix":  # elsewhere a folder cannot be opened
            return
        with self._storing("written"):
            for folder in folders:
                descriptor = os.open(folder, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    @contextmanager
    def _storing(self, what: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full" if full else error.strerror or str(error)
            raise StorageError(
                f"output_dir {str(self.root)!r} cannot be {what}: {reason}; what was finished is kept"
            ) from error

    def _lock(self, number: int) -> bool:
        try:
            import fcntl
        except ImportError:  # no POSIX: everybody may draw everything
            return True
        if self._claims is None:
            return True
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def _unlock(self, number: int) -> None:
        with suppress(ImportError, OSError):
            import fcntl

            if self._claims is not None:
                fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, number)


class DamagedShardError(StorageError):
    """A shard whose files are not what was written. It counts as not drawn."""
