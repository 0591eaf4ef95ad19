"""Attacks within a max-norm ball around an image, with the gradient of the attacked model itself."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

_PGD_STEPS = 20


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Return images moved by ``eps`` along the sign of the gradient (Goodfellow et al. 2015), within [0, 1]."""
    return (images + eps * _gradient(model, images, labels).sign()).clamp(0, 1)


def pgd(model: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int) -> Tensor:
    """Return the last of 20 projected steps of ``eps / 8`` from a random start (Madry et al. 2018)."""
    generator = torch.Generator().manual_seed(seed)
    attacked = images + eps * (2 * torch.rand(images.shape, generator=generator) - 1)
    for _ in range(_PGD_STEPS):
        attacked = attacked + eps / 8 * _gradient(model, attacked.clamp(0, 1), labels).sign()
        attacked = torch.minimum(torch.maximum(attacked, images - eps), images + eps)
    return attacked.clamp(0, 1)


def _gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model(images), labels, reduction="sum"), images)
    return gradient
