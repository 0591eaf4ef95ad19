"""What a sparse network is compared with: pruning of the teacher itself, with and without training or refitting."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from idl.sim.solvers import Hybrid, RowProblem
from idl.training import Labelled, Recipe, fit_supervised

RATES = (1e-3, 5e-3, 2e-2)  # of an epoch of fine-tuning
_BISECTIONS = 12


def linear_layers(network: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a network, first to last."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def magnitude_pruned(teacher: nn.Module, kept: float, everywhere: bool) -> nn.Module:
    """Return the teacher with its largest weights: of the whole network, or of each layer by itself."""
    network = copy.deepcopy(teacher)
    layers = [(layer, "weight") for layer in linear_layers(network)]
    if everywhere:
        prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=1 - kept)
    else:
        for layer, name in layers:
            prune.l1_unstructured(layer, name, amount=1 - kept)
    return network


def refitted_after_pruning(teacher: nn.Module, inputs: Tensor, kept: float) -> nn.Module:
    """Return the teacher pruned by ``|weight| * rms(input)``, each row then fitted to its pre-activations again."""
    moments = list(_layer_moments(teacher, inputs))
    scores = [
        layer.weight.detach().double().abs() * gram.diagonal().sqrt()
        for layer, (gram, _) in zip(linear_layers(teacher), moments, strict=True)
    ]
    together = torch.cat([score.flatten() for score in scores])
    cut = together.kthvalue(len(together) - round(kept * len(together))).values
    supports = [score > cut for score in scores]
    return _with_weights(teacher, [_least_squares(*m, on) for m, on in zip(moments, supports, strict=True)])


def layerwise_lasso(teacher: nn.Module, inputs: Tensor, kept: float) -> nn.Module:
    """Return the teacher with each row replaced by a Lasso fit to its pre-activations, refitted on its support.

    One penalty for all rows, relative to their energies, is searched so that the network keeps the part asked.
    """
    moments = list(_layer_moments(teacher, inputs))
    total = sum(cross.numel() for _, cross in moments)
    layers = linear_layers(teacher)
    rows = [_unit_rows(gram, cross, layer) for (gram, cross), layer in zip(moments, layers, strict=True)]
    low, high, fits = 1e-7, 1.0, []
    starts: list[Tensor | None] = [None] * len(rows)
    for _ in range(_BISECTIONS):
        lam = (low * high) ** 0.5
        fits = [_lasso(gram, cross, lam, start) for (gram, cross), start in zip(rows, starts, strict=True)]
        starts = list(fits)
        if sum(int(fit.count_nonzero()) for fit in fits) > kept * total:
            low = lam
        else:
            high = lam
    fits = [_lasso(gram, cross, high, start) for (gram, cross), start in zip(rows, starts, strict=True)]
    return _with_weights(teacher, [_least_squares(*m, fit != 0) for m, fit in zip(moments, fits, strict=True)])


def fine_tuned(network: nn.Module, train: Labelled, validation: Labelled, seed: int) -> nn.Module:
    """Return the network after one more epoch on the labels, at the best of three rates; pruned weights stay zero."""
    start, tuned = copy.deepcopy(network.state_dict()), []
    for rate in RATES:
        network.load_state_dict(start)
        history = fit_supervised(network, train, validation, Recipe(1, 128, rate, seed))
        tuned.append((history.test_accuracy, copy.deepcopy(network.state_dict())))
    network.load_state_dict(max(tuned, key=lambda pair: pair[0])[1])
    return network


def weights_kept(network: nn.Module) -> int:
    """Return the number of weights that are not zero."""
    return sum(int(layer.weight.count_nonzero()) for layer in linear_layers(network))


def _layer_moments(teacher: nn.Module, inputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each layer the Gram matrix of its inputs, and their products with its pre-activations."""
    x = inputs
    with torch.no_grad():
        for layer in linear_layers(teacher):
            z, precise = layer(x), x.double()
            yield precise.T @ precise / len(x), z.double().T @ precise / len(x)
            x = z.relu()


def _unit_rows(gram: Tensor, cross: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Scale the targets to energy 1."""
    weight = layer.weight.detach().double()
    return gram, cross / ((weight @ gram) * weight).sum(1, keepdim=True).clamp_min(1e-12).sqrt()


def _lasso(gram: Tensor, cross: Tensor, lam: float, start: Tensor | None) -> Tensor:
    problem = RowProblem(gram, cross, torch.ones_like(cross[:, 0]), torch.full_like(gram[0], lam), ball=0, radius=1.0)
    return Hybrid(tol=1e-3).solve(problem, start).W


def _least_squares(gram: Tensor, cross: Tensor, support: Tensor) -> Tensor:
    weight = torch.zeros_like(cross)
    for row, on in enumerate(support):
        weight[row, on] = torch.linalg.lstsq(gram[on][:, on], cross[row, on, None], driver="gelsd").solution[:, 0]
    return weight


def _with_weights(teacher: nn.Module, weights: list[Tensor]) -> nn.Module:
    """Return the teacher with other weights, whose zeros stay zero when it is trained."""
    network = copy.deepcopy(teacher)
    for layer, weight in zip(linear_layers(network), weights, strict=True):
        with torch.no_grad():
            layer.weight.copy_(weight)
        prune.custom_from_mask(layer, "weight", weight != 0)
    return network
