"""The directory of a checkpoint: unfinished under another name, complete after one rename.

runs/step-300.lock.incomplete            held by the one process that saves step-300, and free when it dies
runs/step-300.3f9c0a51d27e.incomplete/   the folder of one save: data files, .metadata, foldpar.json, each fsynced
runs/step-300/                           the same directory after one atomic rename
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from foldpar.checkpoint.manifest import MANIFEST, FileRecord, Manifest
from foldpar.errors import CheckpointError
from foldpar.wording import disk_failed, some

__all__ = [
    "METADATA",
    "Claim",
    "begin",
    "check_shared",
    "check_sizes",
    "damaged_sums",
    "discard",
    "failed_write",
    "latest_checkpoint",
    "publish",
    "read_bounded",
    "read_manifest",
    "remove_leftovers",
    "remove_old",
    "unfinished",
    "wrong_sums",
]

_SUFFIX = ".incomplete"
_LOCK = ".lock"
METADATA = ".metadata"
_LEFTOVER = re.compile(rf"(.+)\.(?:[0-9a-f]{{12}}|lock){re.escape(_SUFFIX)}")
_DEAD_AFTER = 3600.0  # seconds without a change, after which another node's save is taken for dead
_CLEARING = "removing leftovers"
_LARGEST = 2**28  # bytes of a file that is read whole: some million pieces of tensors
_PATIENCE = 5.0  # seconds in which a network file system has to show what another node wrote


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint among the directories in a folder, or ``None``; nothing is communicated.

    Complete means: its ``foldpar.json`` is whole, and every file that it names is there in its full size. Unfinished,
    damaged and unreadable ones are passed over. Newest is the one of the highest step, then the one that was saved
    last; steps, unlike clocks, agree between nodes. While another save may be running, let one rank look and send the
    others what it found.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(latest_checkpoint(folder))
        None

    Raises:
        CheckpointError: the folder itself cannot be read, so that nobody knows whether there is one to go on from.
    """
    found = _complete(Path(folder))
    return found[-1] if found else None


def _complete(folder: Path) -> list[Path]:
    """All complete checkpoints in a folder, the newest last."""
    try:
        paths = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be read ({error}), so it is not known whether it holds a checkpoint to go on from. Give "
            f"it the rights that are missing, or another folder."
        ) from error
    found = [(when, path) for path in paths if (when := _saved_when(path)) is not None]
    return [path for _, path in sorted(found)]


def _saved_when(path: Path) -> tuple[bool, int, float] | None:
    """Step and time of a complete checkpoint; ``None`` if it is none, for whatever reason."""
    try:
        if path.name.endswith(_SUFFIX) or not (path / MANIFEST).is_file():
            return None
        manifest = read_manifest(path)
        check_sizes(path, manifest)
        return manifest.step is not None, manifest.step or 0, float(manifest.time)
    except Exception:  # a stranger's directory may hold anything
        return None


def remove_old(path: Path, keep: int) -> None:
    """Remove complete checkpoints beside one that was just saved, but for it and the newest others, ``keep`` in all.

    Only those whose names differ from its name in numbers alone, and that hold nothing but a checkpoint's files.
    """
    alike = re.compile("[0-9]+".join(re.escape(part) for part in re.split("[0-9]+", path.name)))
    others = [other for other in _complete(path.parent) if other != path and alike.fullmatch(other.name)]
    for other in others[: max(0, len(others) - keep + 1)]:
        own = all(_of_checkpoint(file) or _of_nfs(file) for file in other.iterdir())
        if own and not other.is_symlink() and not os.path.ismount(other):
            removed = unfinished(other, secrets.token_hex(6))  # killed from here on, it is a leftover
            os.rename(other, removed)
            _remove(removed)


def remove_leftovers(folder: Path) -> None:
    """Remove what saves left in a folder that were killed there; what may still be written stays."""
    for name in sorted({match[1] for path in folder.iterdir() if (match := _LEFTOVER.fullmatch(path.name))}):
        path = folder / name
        elsewhere = _Lock.host(path) not in ("", socket.gethostname())
        try:
            lock = _Lock(path, clearing=True)
        except (CheckpointError, OSError):
            continue  # it lives, or it is no lock
        try:
            for leftover in _leftovers(path):
                # Locks of some file systems are known on their own node only.
                if lock.held and not (elsewhere and time.time() - leftover.stat().st_mtime < _DEAD_AFTER):
                    _remove(leftover)
        finally:
            lock.release()


@dataclass(frozen=True, slots=True)
class Claim:
    """One save's own right to a name: its token, its folder, and the lock that says that it lives; of rank 0."""

    path: Path
    token: str
    identity: tuple[int, int]
    """Device and inode of the folder that this save made."""
    lock: _Lock

    @property
    def folder(self) -> Path:
        return unfinished(self.path, self.token)


def unfinished(path: Path, token: str) -> Path:
    """Where the save of this token writes a checkpoint until it is complete."""
    return path.with_name(f"{path.name}.{token}{_SUFFIX}")


def begin(path: Path) -> Claim:
    """Claim a name and make the folder of a save; leftovers of dead saves of this name go.

    Raises:
        CheckpointError: there is something at the path already, or it is being saved.
    """
    _check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _Lock(path)
    try:
        _check_free(path)
        for leftover in _leftovers(path):
            _remove(leftover)
        _check_replaced(path)
        token = secrets.token_hex(6)
        folder = unfinished(path, token)
        folder.mkdir()
        _sync_directory(folder.parent)
        return Claim(path, token, _identity(folder), lock)
    except BaseException:
        lock.release()
        raise


def _check_free(path: Path) -> None:
    """Nothing is at the path but perhaps an empty directory, and nothing is in the way of the unfinished one."""
    if path.name.endswith(_SUFFIX):
        raise CheckpointError(
            f"{path} ends in {_SUFFIX}, which marks checkpoints that are not complete: this one would never be loaded. "
            f"Save under another name."
        )
    if path.is_dir() and (path / MANIFEST).exists():
        raise CheckpointError(
            f"{path} is a complete checkpoint, and a checkpoint is never written over: a save that fails half-way "
            f"would leave none. Save under another name, such as one with the step in it, or remove this one first."
        )
    empty = path.is_dir() and not path.is_symlink() and not os.path.ismount(path) and not any(path.iterdir())
    if os.path.lexists(path) and not empty:
        raise CheckpointError(f"{path} exists and is no checkpoint. Save under a name that is free.")
    for other in (path.with_name(path.name + _SUFFIX), _lock_of(path)):
        if other.is_symlink() or os.path.ismount(other):
            raise CheckpointError(
                f"{other} is a {'link' if other.is_symlink() else 'mount point'}, which no save of foldpar made: what "
                f"it leads to is left as it is, and nothing was written. Remove it, or save under another name."
            )


def _check_replaced(path: Path) -> None:
    leftover = path.with_name(path.name + _SUFFIX)
    if os.path.lexists(leftover):
        raise CheckpointError(
            f"{leftover} is left from a save that was not completed, but holds files that no save of foldpar "
            f"wrote, which are not removed. Move it away, or save under another name."
        )


def check_shared(path: Path, token: str) -> None:
    """See the folder that rank 0 made.

    Raises:
        CheckpointError: it is not there, so that this rank's files would be in another place than those of rank 0.
    """
    if not _soon(lambda: unfinished(path, token).is_dir()):
        raise CheckpointError(
            f"{unfinished(path, token)}, which rank 0 has made, is not there on {socket.gethostname()}: "
            f"{_not_shared(path)}"
        )


def publish(claim: Claim, manifest: Manifest) -> None:
    """Make sure that the folder holds what this save wrote, write the manifest, and give it its name.

    Raises:
        CheckpointError: files are missing or of another size or another save's, or the name was taken meanwhile.
    """
    folder, path = claim.folder, claim.path
    _check_own(claim, manifest.files)
    with open(folder / MANIFEST, "wb") as file:
        file.write(manifest.to_bytes())
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(folder)
    try:
        os.rename(folder, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise CheckpointError(
            f"{path} was made by another save or program while this one was writing, and stays as it is. What this "
            f"save wrote is removed. Let one job save at a time, or save under another name."
        ) from error
    _sync_directory(path.parent)
    claim.lock.release()


def _check_own(claim: Claim, files: Mapping[str, FileRecord]) -> None:
    """All files that the ranks wrote are in this save's folder as this rank sees it, whole, and no others."""
    folder = claim.folder
    of_others = [name for name, record in files.items() if record.save != claim.token]
    if not folder.is_dir() or _identity(folder) != claim.identity or of_others:
        raise CheckpointError(
            f"{folder} is not the folder that this save made any more: another job or program removed or replaced it. "
            f"Nothing was published. Let one job save at a time."
        )
    _soon(lambda: not _wrong_sizes(folder, files))
    wrong = _wrong_sizes(folder, files)
    if wrong:
        raise CheckpointError(
            f"rank 0 on {socket.gethostname()} does not find in {folder} what the ranks wrote there "
            f"({some(wrong, joint='; ')}): {_not_shared(claim.path)}"
        )
    strange = [file.name for file in folder.iterdir() if file.name not in files and not _of_nfs(file)]
    if strange:
        raise CheckpointError(
            f"{folder} holds {some(strange, joint='; ')}, which this save did not write. Nothing was published. Let "
            f"one job save at a time."
        )


def _not_shared(path: Path) -> str:
    return (
        f"{path.parent} is not one shared folder: every node has its own, and no checkpoint would be whole on any. "
        f"Nothing was saved. Give a path on a file system that all nodes share."
    )


def _soon(holds: Callable[[], bool]) -> bool:
    """Whether something holds, if only after a while."""
    end = time.monotonic() + _PATIENCE
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def discard(claim: Claim) -> None:
    """Remove what a save wrote that failed, and let go of the name."""
    if claim.folder.is_dir() and _identity(claim.folder) == claim.identity:
        _remove(claim.folder)
    claim.lock.release()


def _remove(folder: Path) -> None:
    """Remove an unfinished checkpoint, as far as its files are those of a checkpoint."""
    if folder.is_symlink() or not folder.is_dir() or os.path.ismount(folder):
        return
    left = False
    for file in folder.iterdir():
        if _of_checkpoint(file):
            file.unlink()
        else:
            left = left or not _of_nfs(file)
    if not left:
        with suppress(OSError):  # on NFS, removed files that somebody holds open are still there
            folder.rmdir()


def _of_checkpoint(file: Path) -> bool:
    named = file.suffix == ".distcp" or file.name.startswith((METADATA, MANIFEST))
    return named and (file.is_symlink() or not file.is_dir())


def _of_nfs(file: Path) -> bool:
    """What NFS keeps of a removed file that somebody holds open; it goes by itself."""
    return file.name.startswith(".nfs")


def _leftovers(path: Path) -> list[Path]:
    """Folders of saves of this name, which live no more if the name's lock is ours."""
    pattern = re.compile(rf"{re.escape(path.name)}(\.[0-9a-f]{{12}})?{re.escape(_SUFFIX)}")
    found = path.parent.iterdir() if path.parent.is_dir() else ()
    return [other for other in found if pattern.fullmatch(other.name)]


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


# ---------------------------------------------------------------------------------------------------------------------
# The lock of a name.


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + _LOCK + _SUFFIX)


class _Lock:
    """A file that is locked while the process lives that saves at a name, and removed at the end.

    Where a file system has no locks, only tokens keep saves apart.

    Raises:
        CheckpointError: another save holds it, of this process or of another.
    """

    def __init__(self, path: Path, *, clearing: bool = False) -> None:
        patience, end = True, time.monotonic() + 1.0
        self._file = _lock_of(path)
        self._descriptor: int | None = None
        while self._descriptor is None:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                if (patience or not owner or owner.endswith(_CLEARING)) and time.monotonic() < end:
                    patience = False
                    time.sleep(0.02)  # it may only be cleared, or its owner is about to write who it is
                    continue
                raise CheckpointError(
                    f"{path} is being saved already, by {owner or 'another process'}. There is one save at a name at a "
                    f"time: wait() for that one, or save under another name. Nothing was written."
                ) from None
            except OSError:
                os.close(descriptor)
                break
            if self._file.exists() and os.path.samestat(os.fstat(descriptor), self._file.stat()):
                self._descriptor = descriptor
            else:  # its owner has just removed it
                os.close(descriptor)
        self.held = self._descriptor is not None
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            owner = f"{socket.gethostname()} process {os.getpid()}{f' {_CLEARING}' if clearing else ''}"
            os.write(self._descriptor, owner.encode())
        self._released = False

    @staticmethod
    def host(path: Path) -> str:
        """The node of the last process that had the lock of a name."""
        try:
            return _lock_of(path).read_text()[:200].partition(" ")[0]
        except (OSError, ValueError):
            return ""

    def release(self) -> None:
        """Let go of the name; repeating it does nothing."""
        if self._released:
            return
        self._released = True
        with suppress(OSError):
            self._file.unlink()
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # also where a forked process has it still open
            os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Texts, and reading.


def failed_write(error: BaseException) -> str:
    """The text of an error about writing."""
    left = (
        "The unfinished files are removed as far as possible, and checkpoints that were complete before are untouched"
    )
    return disk_failed(str(error), left)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a complete checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or none that is complete, or it is damaged or of a newer format.
    """
    if path.name.endswith(_SUFFIX) and path.is_dir():
        raise CheckpointError(
            f"{path} is a checkpoint that was not completed: the save was killed or failed, and its files are partly "
            f"missing. Load an older one (latest_checkpoint(folder) finds the newest complete one)."
        )
    try:
        text = read_bounded(path / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        leftover = None if path.exists() else next(iter(_leftovers(path)), None)
        if leftover is not None:
            raise CheckpointError(
                f"{path} was not completed: only {leftover.name} is there, from a save that was killed, failed "
                f"or still runs. Load an older one (latest_checkpoint(folder) finds the newest complete one)."
            ) from None
        why = f"it has no {MANIFEST}" if path.exists() else "there is nothing at that path"
        raise CheckpointError(f"{path} is no complete checkpoint: {why}.") from None
    return Manifest.from_bytes(text, str(path / MANIFEST))


def read_bounded(file: Path) -> bytes:
    """All of a regular file of a folder that a stranger may have made.

    Raises:
        CheckpointError: it is something else (a device, a FIFO, a link out of the folder), or too large to be read.
    """
    strange = _strange(file)
    size = file.stat().st_size
    if strange is None and size > _LARGEST:
        strange = f"has {size} bytes, more than the {_LARGEST} that a file which is read whole may have"
    if strange is not None:
        raise CheckpointError(_damaged(file.parent, [f"{file.name} {strange}"]))
    with open(file, "rb") as stream:
        return stream.read(_LARGEST)


def _strange(file: Path) -> str | None:
    """Why reading a file could give what is not in its folder, or never end."""
    if file.is_symlink() and Path(os.path.realpath(file)).parent != Path(os.path.realpath(file.parent)):
        return "is a link that leads out of the folder"
    return None if stat.S_ISREG(file.stat().st_mode) else "is no regular file"


def check_sizes(path: Path, manifest: Manifest) -> None:
    """Compare the sizes of all files with those in the manifest.

    Raises:
        CheckpointError: files are missing, have another size, or are no files.
    """
    wrong = _wrong_sizes(path, manifest.files)
    if wrong:
        raise CheckpointError(_damaged(path, wrong))


def _wrong_sizes(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    wrong = []
    for name, record in files.items():
        try:
            size = (folder / name).stat().st_size
            strange = _strange(folder / name)
        except FileNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if strange is not None:
            wrong.append(f"{name} {strange}")
            continue
        if size != record.size:
            wrong.append(f"{name} has {size} bytes instead of {record.size}")
    return wrong


def wrong_sums(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Of these files, those whose contents have another SHA-256 sum than in the manifest."""
    return [name for name in names if _sum(path / name) != manifest.files[name].sha256]


def damaged_sums(path: Path, names: Iterable[str]) -> str:
    """The text of an error about such files."""
    return _damaged(path, [f"{name} has another SHA-256 sum than when it was written" for name in names])


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _damaged(path: Path, wrong: list[str]) -> str:
    return (
        f"{path} is damaged: {some(wrong, joint='; ')}. Nothing was loaded. Copy it again from where it is "
        f"whole, or load an older one (latest_checkpoint(folder) finds the newest complete one)."
    )


def _sync_directory(path: Path) -> None:
    """Make names in a directory durable; a file system that cannot is left to itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
