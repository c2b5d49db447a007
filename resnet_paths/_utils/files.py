"""Files: locations of shipped data, checksums, and atomic writes."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["cache_folder", "check_output", "check_sha256", "shipped_folder", "write_then_rename"]


def shipped_folder(name: str) -> Path:
    """Folder of files that come with the project, in a checkout or in an installed wheel.

    The wheel has a part of the data only. If the distribution ``resnet-paths-data`` is installed beside it, the folder
    of the data is that of this distribution, which has all of them.

    Args:
        name: ``"data"`` or ``"notebooks"``.

    Returns:
        Absolute path of the folder.

    Raises:
        ResnetPathsError: If the folder does not exist.
    """
    package = Path(__file__).resolve().parents[1]
    in_wheel = package / name
    if name == "data" and in_wheel.is_dir() and (whole := importlib.util.find_spec("resnet_paths_data")) is not None:
        return Path(next(iter(whole.submodule_search_locations or ())))
    for folder in (in_wheel, package.parent / name):
        if folder.is_dir():
            return folder
    raise ResnetPathsError(
        f"shipped folder {name!r}",
        str(package / name),
        f"a folder {name!r} inside the package or beside it",
        "Reinstall the project from a full checkout.",
    )


def cache_folder() -> Path:
    """Folder for downloads: ``$RESNET_PATHS_CACHE`` or ``~/.cache/resnet_paths``; it may not exist yet."""
    # Not platformdirs: a dependency of the whole package, for what these two lines do.
    configured = os.environ.get("RESNET_PATHS_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "resnet_paths"


def check_sha256(path: Path, expected: str, advice: str = "Restore it from the repository.") -> None:
    """Verify the checksum of a file.

    Args:
        path: The file.
        expected: Expected SHA-256 in hexadecimal.
        advice: How to obtain the correct file, as a sentence.

    Raises:
        ResnetPathsError: If the file is missing or has another checksum.
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


def check_output(argument: str, path: Path) -> None:
    """Validate that a file can be written, before the work that makes its content.

    Args:
        argument: Name of the argument, for the message.
        path: The file; it need not exist. Its parent folder is created.

    Raises:
        ResnetPathsError: If something else than a regular file is there, or its folder cannot be written to.
    """
    allowed = "a new or a regular file in a folder that can be written to"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ResnetPathsError(argument, str(path), allowed, "A link, a folder or a device is not replaced.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".unfinished-") as file:
            file.write(b"a")
    except OSError as error:
        raise ResnetPathsError(argument, str(path), allowed, f"{error}. Pass another file.") from error


@contextlib.contextmanager
def write_then_rename(path: Path) -> Iterator[Path]:
    """Context with a temporary path that replaces `path` when the block ends without an error.

    After a crash, `path` is either the old file or the complete new one: the content is flushed to the disk before the
    rename, and the rename is atomic.

    Args:
        path: The final path; its parent folder is created.

    Yields:
        The temporary path to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept, since writers such as matplotlib choose the format by it. Not mkstemp: the final file has the
    # default permissions, which os.umask only tells by setting them, for all threads.
    temporary = path.parent / f".unfinished-{uuid.uuid4().hex}{path.suffix}"
    temporary.touch(exist_ok=False)
    permissions = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(permissions)  # of what some writers put in its place
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
