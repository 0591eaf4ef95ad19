"""Small seeded teachers in float64, each with its forward pass written out by hand."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import oracles
from problems import random

SAMPLES = 9


def seeded(make, seed=0):
    """Make a module with reproducible parameters, in float64 and, as a user's may be, in train mode."""
    torch.manual_seed(seed)
    return make().double()


def linear(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


class MLP(nn.Module):
    """Three linear layers with any callable between them."""

    def __init__(self, phi, bias=True):
        super().__init__()
        self.phi = phi
        self.first, self.second, self.last = (nn.Linear(i, o, bias=bias) for i, o in ((6, 5), (5, 4), (4, 3)))

    def forward(self, u):
        return self.last(self.phi(self.second(self.phi(self.first(u)))))


def chain(layers, kind="relu"):
    """The forward pass of linear layers with one kind of activation between them."""

    def forward(u):
        zs, x = [], u
        for layer in layers[:-1]:
            zs.append(linear(layer, x))
            x = oracles.PHI[kind](zs[-1])
        return zs, linear(layers[-1], x)

    return forward


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.skip = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(6, 3)

    def forward(self, u):
        h = F.relu(self.a(u))
        return self.c(F.relu(self.b(h) + h) + h) - 0.5 * self.skip(u)


def residual_forward(net):
    def forward(u):
        first = linear(net.a, u)
        h = oracles.PHI["relu"](first)
        second = linear(net.b, h) + h
        return [first, second], linear(net.c, oracles.PHI["relu"](second) + h) - 0.5 * linear(net.skip, u)

    return forward


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(size, size), nn.ReLU())

    def forward(self, x):
        return self.body(x)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.ReLU(), nn.Identity()))
        self.blocks = nn.ModuleList([Block(5), Block(5)])
        self.head = nn.Linear(5, 3)

    def forward(self, u):
        x = self.stem(u)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Convolutional(nn.Module):
    """Conv2d, batch norm in ``eval`` after some training, dropout, average pooling, flatten."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.AvgPool2d(2),
            nn.Conv2d(3, 2, 2, bias=False),
            nn.ReLU(),
        )
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(2, 3)

    def forward(self, u):
        return self.head(self.dropout(torch.flatten(self.features(u), 1)))


def trained_convolutional():
    net = Convolutional()
    for seed in range(3):
        net(2 + 3 * random(16, 1, 4, 4, seed=seed).float())  # moves the statistics of the batch norm
    return net


def convolutional_forward(net):
    first, norm, second = net.features[0], net.features[1], net.features[5]

    def forward(u):
        x = F.conv2d(u, first.weight, padding=1) + first.bias[:, None, None]
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        z1 = (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
        x = oracles.PHI["relu"](z1).reshape(-1, 3, 2, 2, 2, 2).mean((3, 5))
        z2 = F.conv2d(x, second.weight)
        return [z1, z2], linear(net.head, oracles.PHI["relu"](z2).reshape(-1, 2))

    return forward


@dataclass(frozen=True)
class Known:
    """A teacher, a batch of inputs, and the forward pass by hand: pre-activations in order, and outputs."""

    name: str
    net: nn.Module
    forward: Any
    kind: str = "relu"
    shape: tuple[int, ...] = (6,)
    names: tuple[str, ...] = ()

    def __str__(self):
        return self.name

    @property
    def u(self):
        return random(SAMPLES, *self.shape, seed=7)

    def recorded(self):
        """Return U, Z, X, Y as they should be: samples as rows, last layer first."""
        with torch.no_grad():
            zs, y = self.forward(self.u)
        Z = torch.cat([z.reshape(SAMPLES, -1) for z in reversed(zs)], 1)
        return self.u.reshape(SAMPLES, -1), Z, oracles.PHI[self.kind](Z), y.reshape(SAMPLES, -1)

    @property
    def sizes(self):
        """Units of each layer, in the order of the forward pass."""
        return [z[0].numel() for z in self.forward(self.u)[0]]


def _sequential(bias):
    net = seeded(lambda: MLP(nn.ReLU(), bias))
    layers = (net.first, net.second, net.last)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), chain(layers)


def _known():
    for name, bias in (("sequential", True), ("sequential without biases", False)):
        net, forward = _sequential(bias)
        yield Known(name, net, forward, names=("1", "3"))
    net = seeded(lambda: MLP(nn.ReLU()))
    yield Known("one module used twice", net, chain((net.first, net.second, net.last)), names=("phi", "phi_1"))
    net = seeded(Nested)
    layers = (net.stem[0], net.blocks[0].body[0], net.blocks[1].body[0], net.head)
    yield Known("nested", net, chain(layers), names=("stem.1.0", "blocks.0.body.1", "blocks.1.body.1"))
    net = seeded(Residual)
    yield Known("residual", net, residual_forward(net), names=("relu", "relu_1"))
    net = seeded(trained_convolutional)
    yield Known("convolutional", net, convolutional_forward(net), "relu", (1, 4, 4), ("features.2", "features.6"))


KNOWN = list(_known())

SPELLINGS = {
    "F.relu": ("relu", F.relu),
    "torch.relu": ("relu", torch.relu),
    "x.relu()": ("relu", lambda x: x.relu()),
    "F.relu in place": ("relu", lambda x: F.relu(x, inplace=True)),
    "F.relu in place, by position": ("relu", lambda x: F.relu(x, True)),
    "F.relu by keyword": ("relu", lambda x: F.relu(input=x)),
    "F.relu_": ("relu", F.relu_),
    "torch.relu_": ("relu", torch.relu_),
    "x.relu_()": ("relu", lambda x: x.relu_()),
    "result of x.relu_() dropped": ("relu", lambda x: (x.relu_(), x)[1]),
    "nn.ReLU(inplace=True)": ("relu", nn.ReLU(inplace=True)),
    "F.leaky_relu": ("leaky_relu", F.leaky_relu),
    "F.leaky_relu_": ("leaky_relu", F.leaky_relu_),
    "nn.LeakyReLU": ("leaky_relu", nn.LeakyReLU()),
    "nn.LeakyReLU(0.01, inplace=True)": ("leaky_relu", nn.LeakyReLU(0.01, inplace=True)),
    "torch.tanh": ("tanh", torch.tanh),
    "F.tanh": ("tanh", F.tanh),
    "x.tanh_()": ("tanh", lambda x: x.tanh_()),
    "nn.Tanh": ("tanh", nn.Tanh()),
    "torch.sigmoid": ("sigmoid", torch.sigmoid),
    "F.sigmoid": ("sigmoid", F.sigmoid),
    "x.sigmoid_()": ("sigmoid", lambda x: x.sigmoid_()),
    "nn.Sigmoid": ("sigmoid", nn.Sigmoid()),
    "F.softplus": ("softplus", F.softplus),
    "nn.Softplus": ("softplus", nn.Softplus()),
    "F.silu": ("silu", F.silu),
    "nn.SiLU(inplace=True)": ("silu", nn.SiLU(inplace=True)),
}


def spelled(spelling):
    """The MLP with one spelling of its activation."""
    kind, phi = SPELLINGS[spelling]
    net = seeded(lambda: MLP(phi))
    return Known(spelling, net, chain((net.first, net.second, net.last), kind), kind)
