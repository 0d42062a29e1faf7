"""A large file that appears complete or not at all, and whose writing survives a kill.

The whole layout (header, order and sizes of the tensors) is known before the first byte. Tensors are
appended to `<final>.partial`; a journal, `<final>.partial.json`, says which of them are safely on disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

from ..errors import PhiquantError

SYNC_BYTES = 64 << 20  # at most this much work is lost by a kill (plus the tensor being written)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Buffer = bytes | bytearray | memoryview
Record = Mapping[str, Any]


class PartialFile:
    """Append the tensors of a known layout; resume after a kill; rename when complete.

        with PartialFile(final, header, names, sizes, fingerprint, align=32) as f:
            for name in f.remaining():
                f.append(name, buffers, record)
            f.commit()

    header: the bytes before the first tensor, padded with zeros to `align`. Every tensor is padded
        to `align` as well, the last one too; align 1 pads nothing.
    fingerprint: what the tensors' bytes depend on. A partial file of the same fingerprint, header
        and layout is continued after its last complete tensor; any other is started anew.
    Leaving the block without commit() keeps the partial file, so that the next run continues it.
    PhiquantError if the disk is full, or if another process writes the same file.
    """

    def __init__(
        self,
        final: Path,
        header: bytes,
        names: Sequence[str],
        sizes: Sequence[int],
        fingerprint: str,
        align: int = 1,
    ) -> None:
        if len(set(names)) != len(names) or len(names) != len(sizes):
            raise PhiquantError(f"{final.name}: a layout has one size for each of its names, and no name twice")
        self.final = Path(final)
        self.partial = self.final.with_name(self.final.name + ".partial")
        self.journal = self.final.with_name(self.final.name + ".partial.json")
        self.records: dict[str, dict[str, Any]] = {}
        self._names, self._sizes = list(names), [int(n) for n in sizes]
        self._align = align
        self._header = header + bytes(-len(header) % align)
        self._ends = list(_cumulative(len(self._header), (n + -n % align for n in self._sizes)))
        self._identity = _digest(fingerprint, self._header, self._names, self._sizes, align)
        self._unsynced = 0
        self._file: BinaryIO | None = None
        self._disk = ThreadPoolExecutor(1, "phiquant-sync")
        self._syncing: Future[None] | None = None

    @property
    def size(self) -> int:
        """Bytes of the complete file."""
        return self._ends[-1]

    @property
    def written(self) -> int:
        """Bytes of the header and of the tensors that are complete."""
        return self._ends[len(self.records)]

    def remaining(self) -> Iterator[str]:
        """Names of the tensors still to be appended, in the order of the layout."""
        while len(self.records) < len(self._names):
            before = len(self.records)
            yield self._names[before]
            if len(self.records) == before:
                raise PhiquantError(f"{self.final.name}: tensor {self._names[before]} was not appended in its turn")

    def __enter__(self) -> PartialFile:
        self.final.parent.mkdir(parents=True, exist_ok=True)
        if self._is_committed():
            return self
        self._file = open(self.partial, "r+b" if self.partial.exists() else "x+b")
        try:
            _lock(self._file, self.partial)
            self._resume()
            self._check_space()
            if not self.records:
                self._file.truncate(0)
                self._file.seek(0)
                self._file.write(self._header)
            else:
                self._file.truncate(self.written)
                self._file.seek(self.written)
        except BaseException as error:
            self._file.close()
            self._file = None
            if isinstance(error, OSError):
                self._raise(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        try:
            if kind is not None:
                self._save_progress()
        finally:
            with suppress(OSError):  # of a sync that the error at hand came before
                self._settle()
            self._file.close()
            self._file = None
            self._disk.shutdown()

    def append(self, name: str, buffers: Iterable[Buffer], record: Record | Callable[[], Record]) -> None:
        """Write the bytes of tensor `name`, the next of the layout.

        record: what the receipt says about it, or a function that is called after the last buffer
            (for digests made while the buffers pass by). It must be JSON.
        """
        index = len(self.records)
        if self._file is None or index == len(self._names) or self._names[index] != name:
            raise PhiquantError(f"{self.final.name}: {name} is not the next tensor of the layout")
        try:
            count = sum(_write(self._file, buffer) for buffer in buffers)
            if count != self._sizes[index]:
                raise PhiquantError(
                    f"{self.final.name}: {name} has {count} bytes, its layout says {self._sizes[index]}"
                )
            self._file.write(bytes(-count % self._align))
            self.records[name] = dict(record() if callable(record) else record)
            self._unsynced += count
            if self._unsynced >= SYNC_BYTES:
                self._sync(wait=False)
        except OSError as error:
            self.records.pop(name, None)
            self._raise(error)

    def finish(self) -> None:
        """Everything on disk and in the journal, under the partial name. PhiquantError if tensors are missing."""
        if missing := self._names[len(self.records) :]:
            raise PhiquantError(f"{self.final.name}: {len(missing)} tensors were not written, first {missing[0]}")
        if self._file is not None:
            try:
                self._sync()
            except OSError as error:
                self._raise(error)

    def commit(self, keep_journal: bool = False) -> None:
        """Give the file its final name. `keep_journal`: until forget(), another run finds it complete."""
        self.finish()
        if self._file is not None:
            self._file.close()
            self._file = None
            os.replace(self.partial, self.final)
            sync_folder(self.final.parent)
        if not keep_journal:
            self.forget()

    def forget(self) -> None:
        """Remove the journal: the file is complete and so are those beside it."""
        self.journal.unlink(missing_ok=True)

    def _is_committed(self) -> bool:
        """Whether an earlier run completed this very file and was killed before it completed the others."""
        if self.partial.exists() or not self.final.is_file() or self.final.stat().st_size != self.size:
            return False
        records = self._journaled()
        if len(records) != len(self._names):
            return False
        self.records = records
        return True

    def _resume(self) -> None:
        records = self._journaled()
        size = os.fstat(self._fileno()).st_size
        self.records = records if records and size >= self._ends[len(records)] else {}

    def _journaled(self) -> dict[str, dict[str, Any]]:
        """Records of the journal, or {} if there is none, it is damaged, or it is of another file."""
        try:
            data = json.loads(self.journal.read_text(encoding="utf-8"))
            records = data["records"]
            if data["identity"] != self._identity or list(records) != self._names[: len(records)]:
                return {}
            return {name: dict(record) for name, record in records.items()}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}

    def _sync(self, wait: bool = True) -> None:
        """Data first, then the journal that vouches for it; without `wait` while the next tensors are written."""
        assert self._file is not None
        self._settle()
        self._file.flush()
        text = json.dumps({"identity": self._identity, "records": self.records})
        self._syncing = self._disk.submit(self._vouch, self._fileno(), text)
        self._unsynced = 0
        if wait:
            self._settle()

    def _vouch(self, descriptor: int, text: str) -> None:
        os.fsync(descriptor)
        write_atomically(self.journal, text)

    def _settle(self) -> None:
        """Until what was given to the disk is there. OSError if it is not."""
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    def _save_progress(self) -> None:
        """After an error: drop the tensor that was being written (this frees space), keep the others."""
        assert self._file is not None
        try:
            self._file.flush()
        except OSError:
            return  # what could not be written is after the last journal, which stands
        try:
            self._file.truncate(self.written)
            self._sync()
        except OSError:
            return

    def _check_space(self) -> None:
        have = os.fstat(self._fileno()).st_size
        if self.size - have > shutil.disk_usage(self.final.parent).free:
            raise self._full()

    def _raise(self, error: OSError) -> NoReturn:
        if error.errno in _FULL:
            raise self._full(error) from error
        raise error

    def _full(self, error: OSError | None = None) -> PhiquantError:
        reason = "the limit on the size of a file is reached" if error and error.errno == errno.EFBIG else ""
        free = shutil.disk_usage(self.final.parent).free
        return PhiquantError(
            f"{reason or 'the disk is full'}: {self.final} takes {self.size:,} bytes, {self.written:,} are written and "
            f"{free:,} are free. Free some space and run the same command again: it continues {self.partial.name}"
        )

    def _fileno(self) -> int:
        assert self._file is not None
        return self._file.fileno()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file (text as UTF-8) so that its name never stands for half of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last. Windows cannot open a folder and needs no such call."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(file: BinaryIO, buffer: Buffer) -> int:
    view = memoryview(buffer).cast("B")
    file.write(view)
    return view.nbytes


def _cumulative(start: int, steps: Iterable[int]) -> Iterator[int]:
    yield start
    for step in steps:
        start += step
        yield start


def _digest(fingerprint: str, header: bytes, names: list[str], sizes: list[int], align: int) -> str:
    layout = json.dumps([fingerprint, names, sizes, align]).encode()
    return hashlib.sha256(hashlib.sha256(header).digest() + layout).hexdigest()


def _lock(file: BinaryIO, path: Path) -> None:
    """Two writers of one file would mix their bytes. The lock ends with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PhiquantError(f"another process is writing {path}; wait for it, or choose another folder") from error
