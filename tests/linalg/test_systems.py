import subprocess
import sys

import pytest
import torch

from idl.linalg.systems import solve
from problems import random

ON_TWO_THREADS = """
import torch
from idl.linalg.systems import solve
torch.set_num_threads(2)
A = torch.eye(200, dtype=torch.float64) + 0.1 * torch.randn(3, 200, 200, dtype=torch.float64) / 200
B = torch.randn(3, 200, 5, dtype=torch.float64)
A.requires_grad_()
X = solve(A, B)
X.sum().backward()
print(float((A @ X - B).detach().abs().max()) < 1e-10, bool(A.grad.isfinite().all()))
"""


@pytest.mark.parametrize("shape", [(6, 6), (4, 6, 6), (2, 3, 6, 6), (0, 6, 6)], ids=str)
def test_each_system_of_a_batch_is_solved(shape):
    A = torch.eye(6, dtype=torch.float64) + 0.1 * random(*shape, seed=0)
    B = random(*shape[:-1], 2, seed=1)
    torch.testing.assert_close(A @ solve(A, B), B, rtol=1e-12, atol=1e-12)


def test_a_singular_system_is_not_finite_and_no_error():
    A = torch.zeros(2, 3, 3)
    A[0] = torch.eye(3)
    X = solve(A, torch.ones(2, 3, 1))
    assert bool((X[0] == 1).all())
    assert not bool(X[1].isfinite().all())


def test_several_threads_do_not_hang_on_large_systems():
    found = subprocess.run([sys.executable, "-c", ON_TWO_THREADS], capture_output=True, text=True, timeout=120)
    assert found.stdout == "True True\n", found.stderr
