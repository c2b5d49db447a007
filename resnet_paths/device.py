"""Where to compute: one rule for ``device="auto"``."""

from __future__ import annotations

import torch

from resnet_paths.errors import ResnetPathsError

__all__ = ["choose_device"]


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device meant by `device`; ``"auto"`` is the accelerator if there is one, else the CPU.

    Args:
        device: ``"auto"``, or what `torch.device` takes.

    Returns:
        The device.

    Raises:
        ResnetPathsError: If it is no device.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ResnetPathsError("device", device, "'auto' or a device of torch, such as 'cpu' or 'cuda:0'") from error
