import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small matrices are fastest on one thread, and tests that share two cores do not disturb each other."""
    torch.set_num_threads(1)
