"""What every test shares: a compilation cache, hypothesis profiles, 64-bit mode on request."""

import json
import os
import zlib
from collections import defaultdict
from pathlib import Path

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


SECONDS = Path(__file__).with_name("seconds.json")
"""Seconds of each test, a mean over its cases, as `tests/seconds.py` wrote them down."""

CASES, ALONE = 1.5, 4.0
"""Seconds that the quick set gives to all cases of a test, and to a test that has one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as ``long`` what a quick run leaves out: cases of costly tests, and very costly tests.

    Of a test over many cases the quick set takes as many as its seconds buy, one at least, at equal
    distances. Where they begin differs from test to test, by the test's name: so every recipe and
    part meets some tests, and every test some of them.
    """
    cost = json.loads(SECONDS.read_text())
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    for name, cases in tests.items():
        each = cost.get(name, 0.0)
        most = len(cases) if each * len(cases) <= CASES else max(1, int(CASES / each))
        quick = 0 if each > ALONE else most
        step = len(cases) / max(quick, 1)
        first = zlib.crc32(name.encode())
        kept = {int(first + i * step) % len(cases) for i in range(quick)}
        for i, case in enumerate(cases):
            if i not in kept:
                case.add_marker(pytest.mark.long)


def pytest_configure(config: pytest.Config) -> None:
    """Compiled functions are kept between runs, beside pytest's own cache."""
    cache = getattr(config, "cache", None)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


@pytest.fixture
def x64():
    """The test runs in float64."""
    with enable_x64(True):
        yield
