"""Strict promotion, one cache of compiled programs for all workers, the implementations under test, hypothesis."""

import functools
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from hypothesis import settings

IMPLEMENTATIONS = ["chunked"]
KERNELS = [*(["gpu"] if jax.__version_info__ >= (0, 11) else []), "tpu"]  # "gpu" in bfloat16 alone

# Compiling is most of the time, so programs are compiled quickly and not to run fast; notebooks and commands, which
# .ci/run runs too, are compiled as users have it.
QUICK = "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * (jax.__version_info__ < (0, 11))
AS_USERS = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace(QUICK, "").strip()}  # for children that are measured
if not Path("/dev/nvidiactl").exists() and QUICK not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"

# The interpreter of kernels holds a thread of XLA's pool for each warpgroup. Read when JAX first makes an array.
os.environ.setdefault("PJRT_NPROC", "16")

settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", help="where test_workbench_browser.py leaves pictures of what it saw")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "standard_dtype_promotion: runs foreign code (optax, baselines) that mixes dtypes on purpose"
    )
    shared = getattr(config, "workerinput", {}).get("compiled")
    config.compiled = shared or tempfile.mkdtemp(prefix="rattn-compiled-")  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", config.compiled)  # type: ignore[attr-defined]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Of pytest-xdist: a worker compiles into the folder of the session, and finds there what another compiled."""
    node.workerinput["compiled"] = node.config.compiled


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Of pytest-xdist: a file whose tests share what it builds once runs in one worker; others are dealt out by test.

    `--dist loadgroup` would do it by marks, but pytest 9.2 does not see the groups that pytest-xdist 3.8 writes.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFileWhereShared(LoadScopeScheduling):
        @functools.cache  # noqa: B019 (one scheduler a session)
        def shares(self, file: str) -> bool:
            return 'scope="module"' in (config.rootpath / file).read_text(encoding="utf-8")

        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if self.shares(file) else nodeid

    return ByFileWhereShared(config, log)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(config.compiled, ignore_errors=True)  # type: ignore[attr-defined]


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


@pytest.fixture(scope="session", params=["reference", *IMPLEMENTATIONS])
def implementation_or_reference(request: pytest.FixtureRequest) -> str:
    return request.param
