"""The one question about torch that has no public answer."""

import torch


def transforms_are_active() -> bool:
    """Return whether some :mod:`torch.func` transform is running, under which a tensor may stand for many values."""
    return torch._C._are_functorch_transforms_active()
