"""Data-parallel training on two processes gives the gradient of one process."""

import importlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

from idl import IDLAttention, ImplicitFunctionTriu, ImplicitModel, ImplicitRNN

TIGHT = {"tol": 1e-7, "grad_tol": 1e-7}
WORLD, TIMES = 2, 4


class LastToken(IDLAttention):
    """Implicit attention, and of its outputs those of the last token."""

    def forward(self, u):
        return super().forward(u)[:, -1, :3]


MODELS = {
    "full": lambda: ImplicitModel(8, 5, 3, **TIGHT),
    "low rank": lambda: ImplicitModel(8, 5, 3, low_rank=True, rank=2, bias=True, **TIGHT),
    "callable activation": lambda: ImplicitModel(8, 5, 3, activation=torch.sin, **TIGHT),
    "triangular": lambda: ImplicitModel(8, 5, 3, f=ImplicitFunctionTriu),
    "recurrent": lambda: ImplicitRNN(5, 3, 4, 6, num_layers=2, bidirectional=True, **TIGHT),
    "parallel in time": lambda: ImplicitRNN(5, 3, 4, 6, activation="tanh", parallel_in_time=True, **TIGHT),
    "softmax": lambda: LastToken(5, 2, TIMES, head_size=4, **TIGHT),
    "lipschitz": lambda: LastToken(5, 2, TIMES, attention_version="lipschitz", head_size=4, **TIGHT),
}

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def model_of(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def data(name):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, TIMES, 5, generator=generator, dtype=torch.float64)
    # The ranks take different numbers of steps; softmax attention need not converge on large inputs.
    inputs[: len(inputs) // WORLD] *= 2 if isinstance(model_of(name), LastToken) else 10
    targets = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return (inputs[:, 0] if isinstance(model_of(name), ImplicitModel) else inputs), targets


def gradients(model, inputs, targets):
    model.zero_grad()
    (model(inputs) - targets).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def worker(rank, folder):
    """Write the gradients of each model, averaged over the ranks, in one process of the group."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    results = {}
    for name in MODELS:
        share = [t.chunk(WORLD)[rank] for t in data(name)]
        model = DistributedDataParallel(model_of(name))
        gradients(model, *share)  # the second backward uses the buckets that the first one ordered
        results[name] = gradients(model, *share)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_gradient_of_a_single_process(tmp_path):
    # By the name under which the new processes find this file, which differs from the one that pytest gave it.
    found = importlib.import_module("test_distributed").worker
    multiprocessing.spawn(found, (str(tmp_path),), nprocs=WORLD)
    for rank in range(WORLD):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name in MODELS:
            for shared, alone in zip(results[name], gradients(model_of(name), *data(name)), strict=True):
                torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-8)  # those of TIGHT
                assert alone.abs().max() > 0
