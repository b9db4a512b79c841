"""The directory of a checkpoint: unfinished under another name, complete after one rename.

runs/step-300.incomplete/   data files, then .metadata, then foldpar.json, each fsynced
runs/step-300/              the same directory after one atomic rename
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from foldpar.checkpoint_manifest import MANIFEST, Manifest
from foldpar.errors import CheckpointError

__all__ = [
    "begin",
    "check_sizes",
    "damaged_sums",
    "discard",
    "failed_write",
    "latest_checkpoint",
    "publish",
    "read_manifest",
    "unfinished",
    "wrong_sums",
]

_SUFFIX = ".incomplete"
_METADATA = ".metadata"
_SHOWN = 5


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint among the directories in a folder, or ``None``; nothing is communicated.

    Complete means: its ``foldpar.json`` is whole, and every file that it names is there in its full size. Unfinished
    and damaged checkpoints are passed over. Newest by the time at which it was saved, which copying does not change.
    While another save may be running, let one rank look and send the others what it found.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(latest_checkpoint(folder))
        None
    """
    found: list[tuple[float, str, Path]] = []
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.name.endswith(_SUFFIX) and (path / MANIFEST).is_file():
            try:
                manifest = read_manifest(path)
                check_sizes(path, manifest)
            except (CheckpointError, OSError):
                continue
            found.append((manifest.time, path.name, path))
    return max(found)[2] if found else None


def unfinished(path: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return path.with_name(path.name + _SUFFIX)


def begin(path: Path) -> None:
    """Make the unfinished directory, in the place of a leftover of an earlier attempt.

    Raises:
        CheckpointError: there is something at the path already.
    """
    if path.is_dir() and (path / MANIFEST).exists():
        raise CheckpointError(
            f"{path} is a complete checkpoint, and a checkpoint is never written over: a save that fails half-way "
            f"would leave none. Save under another name, such as one with the step in it, or remove this one first."
        )
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is no checkpoint. Save under a name that is free.")
    leftover = unfinished(path)
    if leftover.exists():
        discard(path)
        if leftover.exists():
            raise CheckpointError(
                f"{leftover} is left from a save that was not completed, but holds files that no save of foldpar "
                f"wrote, which are not removed. Move it away, or save under another name."
            )
    leftover.mkdir(parents=True)
    _sync_directory(leftover.parent)


def publish(path: Path, manifest: Manifest) -> None:
    """Write the manifest, make sure that all is on the disk, and give the directory its name."""
    leftover = unfinished(path)
    with open(leftover / MANIFEST, "wb") as file:
        file.write(manifest.to_bytes())
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(leftover)
    os.rename(leftover, path)
    _sync_directory(path.parent)


def discard(path: Path) -> None:
    """Remove an unfinished checkpoint, as far as its files are those of a checkpoint."""
    leftover = unfinished(path)
    if not leftover.is_dir():
        return
    for file in leftover.iterdir():
        if file.suffix == ".distcp" or file.name.startswith((_METADATA, MANIFEST)):
            file.unlink()
    if not any(leftover.iterdir()):
        leftover.rmdir()


def failed_write(error: Exception) -> str:
    """The text of an error about writing."""
    return (
        f"{error}. The unfinished files are removed as far as possible, and checkpoints that were complete before are "
        f"untouched. If the disk is full, free space and save again."
    )


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
        text = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if not path.exists() and unfinished(path).exists():
            raise CheckpointError(
                f"{path} was not completed: only {unfinished(path).name} is there, from a save that was killed, failed "
                f"or still runs. Load an older one (latest_checkpoint(folder) finds the newest complete one)."
            ) from None
        why = f"it has no {MANIFEST}" if path.exists() else "there is nothing at that path"
        raise CheckpointError(f"{path} is no complete checkpoint: {why}.") from None
    return Manifest.from_bytes(text, str(path / MANIFEST))


def check_sizes(path: Path, manifest: Manifest) -> None:
    """Compare the sizes of all files with those in the manifest.

    Raises:
        CheckpointError: files are missing or have another size.
    """
    wrong = []
    for name, record in manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if size != record.size:
            wrong.append(f"{name} has {size} bytes instead of {record.size}")
    if wrong:
        raise CheckpointError(_damaged(path, wrong))


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
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return (
        f"{path} is damaged: {'; '.join(wrong[:_SHOWN])}{more}. Nothing was loaded. Copy it again from where it is "
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
