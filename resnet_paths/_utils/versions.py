"""Versions of what a result or an error depends on."""

from __future__ import annotations

import importlib.metadata
import platform
import re

__all__ = ["show_versions"]

_NOT_LISTED = ("test", "docs", "release")


def show_versions() -> None:
    """Print the versions of this package, Python and all dependencies, with extras, and the devices.

    Add the output to a report of an error.

    Example:
        >>> show_versions()  # doctest: +ELLIPSIS
        resnet_paths ...
        python ...
    """
    import torch

    import resnet_paths

    rows = {"resnet_paths": resnet_paths.__version__, "python": platform.python_version()}
    rows |= {"platform": platform.platform(), "threads": str(torch.get_num_threads())}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    rows["accelerator"] = "none" if accelerator is None else _named(accelerator)
    rows |= {name: _version_of(name) for name in _dependencies()}
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}} {value}" for name, value in rows.items()))  # noqa: T201 - what it is for


def _named(accelerator: object) -> str:
    import torch

    return torch.cuda.get_device_name() if str(accelerator).startswith("cuda") else str(accelerator)


def _dependencies() -> list[str]:
    """The dependencies of the installed package; torch alone if it is not installed."""
    try:
        required = importlib.metadata.requires("resnet_paths") or []
    except importlib.metadata.PackageNotFoundError:
        return ["torch"]
    listed = [line for line in required if not re.search(rf"extra == ['\"]({'|'.join(_NOT_LISTED)})['\"]", line)]
    names = {re.match(r"[A-Za-z0-9_.-]+", line)[0] for line in listed}  # type: ignore[index] # a requirement has a name
    return sorted(names - {"resnet_paths", "resnet-paths"}, key=str.lower)


def _version_of(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
