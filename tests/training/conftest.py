import jaxtyping
import pytest


@pytest.fixture
def as_users_run_it():
    """Switch the checking of annotations off, as it is outside of the tests, to reach our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
