"""State-driven implicit modelling: convex training from the states of a pretrained network."""

from idl.sim.certificate import Certificate, WeightsKept
from idl.sim.sim import SIM, lambda_path

__all__ = ["SIM", "Certificate", "WeightsKept", "lambda_path"]
