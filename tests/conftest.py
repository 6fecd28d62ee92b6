"""Strict promotion around every test, the implementations under test, and how hypothesis draws."""

import os

import jax
import pytest
from hypothesis import settings

IMPLEMENTATIONS = ["chunked"]
KERNELS = [*(["gpu"] if jax.__version_info__ >= (0, 11) else []), "tpu"]  # "gpu" in bfloat16 alone

# The interpreter of kernels holds a thread of XLA's pool for each warpgroup. Read when JAX first makes an array.
os.environ.setdefault("PJRT_NPROC", "16")

settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", help="where test_panel_browser.py leaves pictures of what it saw")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "standard_dtype_promotion: runs foreign code (optax, baselines) that mixes dtypes on purpose"
    )


@pytest.fixture(autouse=True)
def _strict_promotion(request: pytest.FixtureRequest):
    standard = request.node.get_closest_marker("standard_dtype_promotion") is not None
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("standard" if standard else "strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """They are gigabytes by the end of the suite."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", params=IMPLEMENTATIONS + KERNELS)
def implementation_or_kernel(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", params=["reference", *IMPLEMENTATIONS, *KERNELS])
def implementation_or_reference_or_kernel(request: pytest.FixtureRequest) -> str:
    return request.param
