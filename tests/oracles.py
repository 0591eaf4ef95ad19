"""What the library is measured against: plain torch in float64 that shares no line with it.

A map is a function ``f(x, *tensors)`` of rows ``x``; the oracles know neither solvers nor adjoints.
"""

import torch

PHI = {
    "relu": lambda z: torch.where(z > 0, z, 0),
    "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "tanh": lambda z: 1 - 2 / (1 + torch.exp(2 * z)),
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
    "softplus": lambda z: torch.log1p(torch.exp(z)),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "identity": lambda z: z,
    "atan": torch.atan,
    "softmax": lambda z: torch.exp(z) / torch.exp(z).sum(-1, keepdim=True),
    "prelu": lambda z, weight: torch.where(z > 0, z, weight * z),
}


def rescaled_rows(A, radius):
    sums = A.abs().sum(1, keepdim=True)
    return torch.where(sums > radius, radius * A / sums, A)


def rescaled_factors(L, R, radius):
    """Rows of ``L`` are scaled by the row sums of ``|L| |R|^T``, a bound on those of ``|L R^T|``."""
    sums = (L.abs() @ R.abs().T).sum(1, keepdim=True)
    return torch.where(sums > radius, radius * L / sums, L) @ R.T


def projected_rows(A, radius):
    """Projection on the l1 ball by sorting (Duchi et al. 2008)."""
    rows = []
    for a in A:
        ordered = a.abs().sort(descending=True).values
        excess = (ordered.cumsum(0) - radius) / torch.arange(1, len(a) + 1)
        threshold = excess[int((ordered > excess).sum()) - 1]
        rows.append(torch.sign(a) * torch.relu(a.abs() - threshold.clamp_min(0)))
    return torch.stack(rows)


def unrolled(f, x0, *tensors, steps=35):
    """Return the last of ``steps`` applications: exact to rounding where ``f`` contracts by 0.4, and so its derivatives
    of any order by autograd."""
    for _ in range(steps):
        x0 = f(x0, *tensors)
    return x0


def _pulled_back(f, x, tensors, costate):
    tensors = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(f(x.detach(), *tensors), tensors, costate)


def _jacobian(f, x, tensors):
    return torch.autograd.functional.jacobian(lambda x: f(x, *tensors), x.detach()).reshape(x.numel(), x.numel())


def implicit_gradient(f, x, tensors, cotangent):
    """Return the gradients of ``sum(cotangent * x)`` at a fixed point ``x``, by one dense solve with ``I - J^T``."""
    J = _jacobian(f, x, tensors)
    costate = torch.linalg.solve((torch.eye(len(J), dtype=J.dtype) - J).T, cotangent.flatten())
    return _pulled_back(f, x, tensors, costate.reshape(x.shape))


def neumann_gradient(f, x, tensors, cotangent, steps, damping):
    r"""Return what ``steps`` damped steps at ``x`` give: :math:`\alpha\sum_{k<steps}(\alpha J+(1-\alpha)I)^k`."""
    J = _jacobian(f, x, tensors)
    M = damping * J + (1 - damping) * torch.eye(len(J), dtype=J.dtype)
    series = damping * sum(torch.linalg.matrix_power(M, k) for k in range(steps))
    return _pulled_back(f, x, tensors, (series.T @ cotangent.flatten()).reshape(x.shape))


def finite_difference(function, tensors, directions, eps):
    """Return the derivative of ``function`` along ``directions`` by a central difference."""
    forth, back = ([t + s * d for t, d in zip(tensors, directions, strict=True)] for s in (eps, -eps))
    return (function(*forth) - function(*back)) / (2 * eps)


def stiff_equilibrium(A, z0):
    """Return the ReLU equilibrium of a non-negative ``A`` with row sums below 1: Newton in float64, until exact."""
    x = torch.zeros_like(z0)
    for _ in range(100):
        slope = (x @ A.T + z0 > 0).double()
        systems = torch.eye(len(A), dtype=A.dtype) - slope[:, :, None] * A
        x, last = torch.linalg.solve(systems, (slope * z0)[:, :, None])[:, :, 0], x
        if torch.equal(x, last):
            return x
    raise AssertionError("the activity pattern did not settle")
