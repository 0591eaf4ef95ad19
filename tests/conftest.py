import importlib
import warnings

import jaxtyping
import pytest
import torch

with warnings.catch_warnings():
    # torch's own forward mode scripts its decompositions when it is first used, and warns that scripting is deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    importlib.import_module("torch._decomp.decompositions_for_jvp")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small matrices are fastest on one thread, and tests that share two cores do not disturb each other."""
    torch.set_num_threads(1)


@pytest.fixture
def as_users_run_it():
    """Switch the checking of annotations off, as it is outside of the tests, to reach our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
