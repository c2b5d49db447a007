"""Files on disk: where the shipped data lies, checksums, and writing that is never seen half done."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["cache_folder", "check_sha256", "shipped_folder", "write_then_rename"]


def shipped_folder(name: str) -> Path:
    """Folder of what comes with the project, in a checkout and in an installed wheel alike.

    Args:
        name: ``"data"`` or ``"notebooks"``.

    Returns:
        The folder's absolute path.

    Raises:
        ResnetPathsError: If neither place holds the folder.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise ResnetPathsError(
        f"shipped folder {name!r}",
        str(package / name),
        f"a folder {name!r} inside the package or beside it",
        "Install the project again from a full checkout.",
    )


def cache_folder() -> Path:
    """Folder for downloads: ``$RESNET_PATHS_CACHE``, else ``~/.cache/resnet_paths``; not created here."""
    # Not platformdirs: a dependency of the whole package, for what these two lines do.
    configured = os.environ.get("RESNET_PATHS_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "resnet_paths"


def check_sha256(path: Path, expected: str, advice: str = "Restore it from the repository.") -> None:
    """Refuse a file whose content is not the one that was shipped.

    Args:
        path: The file.
        expected: Its SHA-256 in hexadecimal.
        advice: How to get the right file, as a sentence.

    Raises:
        ResnetPathsError: If the file is missing or its checksum differs.
    """
    if not path.is_file():
        raise ResnetPathsError("data file", str(path), "an existing file", advice)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ResnetPathsError(
            f"data file {path}",
            f"sha256 {found}",
            f"sha256 {expected}",
            f"The file is corrupt or incomplete. {advice}",
        )


@contextlib.contextmanager
def write_then_rename(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once the block ends without an error.

    A crash at any moment leaves either the old file or the new one, never a part: the content is
    flushed to the disk before the rename, and the rename is atomic.

    Args:
        path: The final path; its folder is created.

    Yields:
        The temporary path to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The final suffix stays last: writers such as matplotlib choose the format by it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes private files; what we leave behind has ordinary permissions.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
