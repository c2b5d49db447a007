"""Where to compute: one rule for ``device="auto"``, and one for float64."""

from __future__ import annotations

import torch

from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["choose_device", "wide", "widest_float"]


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


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64: where it lies, or on the CPU where its device has no float64."""
    has_float64 = widest_float(tensor.device) == torch.float64
    return (tensor if has_float64 else tensor.cpu()).double()


def widest_float(device: torch.device) -> torch.dtype:
    """The most precise floating numbers that a device has: float64, but for Apple's, which have float32.

    Args:
        device: The device.

    Returns:
        Their dtype.

    Example:
        >>> widest_float(torch.device("cuda")), widest_float(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float32 if device.type == "mps" else torch.float64
