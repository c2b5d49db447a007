"""Choice of devices and floating-point types."""

from __future__ import annotations

import torch
from torch._guards import detect_fake_mode

from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["choose_device", "wide", "widest_float"]


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Convert to a `torch.device`; ``"auto"`` is the accelerator if one is available, otherwise the CPU.

    Args:
        device: ``"auto"``, or a valid argument of `torch.device`.

    Returns:
        The device.

    Raises:
        ResnetPathsError: If `device` is not a valid device.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if isinstance(device, str) and device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    allowed = "'auto' or a torch device, such as 'cpu' or 'cuda:0'"
    if not isinstance(device, str | torch.device):
        raise ResnetPathsError("device", device, allowed)
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ResnetPathsError("device", device, allowed) from error
    if detect_fake_mode() is not None:  # tensors without values, on any device
        return chosen
    if chosen.type == "meta":
        raise ResnetPathsError("device", device, allowed, "Tensors on 'meta' have no values.")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if chosen.type in ("cuda", "mps", "xpu"):
        num = torch.accelerator.device_count() if accelerator and accelerator.type == chosen.type else 0
        if (chosen.index or 0) >= num:
            raise ResnetPathsError("device", device, allowed, f"There are {num} devices of type {chosen.type!r}.")
    return chosen


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64: on its device, or on the CPU if its device does not support float64."""
    has_float64 = widest_float(tensor.device) == torch.float64
    return (tensor if has_float64 else tensor.cpu()).double()


def widest_float(device: torch.device) -> torch.dtype:
    """The most precise floating-point dtype of a device: float64, except float32 on MPS.

    Args:
        device: The device.

    Returns:
        The dtype.

    Example:
        >>> widest_float(torch.device("cuda")), widest_float(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float32 if device.type == "mps" else torch.float64
