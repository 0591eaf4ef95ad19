"""Data-parallel training on two processes gives the gradient of one process."""

import importlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

from idl import ImplicitFunctionTriu, ImplicitModel

TIGHT = {"tol": 1e-7, "grad_tol": 1e-7}
OPTIONS = {
    "full": TIGHT,
    "low rank": {"low_rank": True, "rank": 2, "bias": True, **TIGHT},
    "callable activation": {"activation": torch.sin, **TIGHT},
    "triangular": {"f": ImplicitFunctionTriu},
}
WORLD = 2

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def model_of(name):
    torch.manual_seed(0)
    return ImplicitModel(8, 5, 3, **OPTIONS[name]).double()


def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    inputs[: len(inputs) // WORLD] *= 10  # the ranks take different numbers of steps
    return inputs, torch.randn(8, 3, generator=generator, dtype=torch.float64)


def gradients(model, inputs, targets):
    model.zero_grad()
    (model(inputs) - targets).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def worker(rank, folder):
    """Write the gradients of each model, averaged over the ranks, in one process of the group."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    share = [t.chunk(WORLD)[rank] for t in data()]
    results = {}
    for name in OPTIONS:
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
        for name in OPTIONS:
            for shared, alone in zip(results[name], gradients(model_of(name), *data()), strict=True):
                torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-8)  # those of TIGHT
                assert alone.abs().max() > 0
