"""What every test shares: a compilation cache, hypothesis profiles, 64-bit mode on request."""

import os

# Two test processes on two cores: LAPACK's own threads would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Compiling is most of what tests cost, and hardly anything runs twice: LLVM optimizes nothing, and
# of two ways to compile a fusion it is the one that takes half the time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
    ]
)

import hypothesis
import jax
import pytest
from jax import enable_x64

common = {
    "deadline": None,
    "max_examples": 10,
    "suppress_health_check": [
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
}
hypothesis.settings.register_profile("dev", **common)
hypothesis.settings.register_profile("ci", derandomize=True, print_blob=True, **common)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_configure(config: pytest.Config) -> None:
    """Compiled functions are kept between runs, beside pytest's own cache."""
    cache = getattr(config, "cache", None)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture
def x64():
    """The test runs in float64."""
    with enable_x64(True):
        yield
