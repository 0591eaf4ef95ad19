"""State-driven implicit modelling: convex training from the states of a pretrained network."""

from idl.sim.certificate import Certificate, WeightsKept
from idl.sim.path import lambda_path
from idl.sim.sim import SIM

__all__ = ["SIM", "Certificate", "WeightsKept", "lambda_path"]
