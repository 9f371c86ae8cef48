"""Sharded parameters, data and state: `on_devices.py` in processes with more than one device.

The rest of the suite keeps its one device. Equality is to rounding in float64. These are the checks
that differ most; ``JAX_ENABLE_X64=1 XLA_FLAGS=--xla_force_host_platform_device_count=8 python
tests/on_devices.py`` makes all of them.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

SCRIPT = Path(__file__).with_name("on_devices.py")
EIGHT_DEVICES = (
    "train_auto_fsdp",
    "train_auto_tensor",
    "train_explicit_fsdp",
    "train_explicit_tensor",
    "data_parallel_by_shard_map",
    "replicas_sophia_h",
    "replicas_natural_gradient",
    "replicas_by_products",
    "products_gather_nothing",
    "basis_eigen",
    "basis_random",
    "layers_auto",
    "recipe_explicit",
    "stack_by_layers_auto",
    "stack_by_columns_explicit",
    "learner_explicit",
    "hessian_explicit",
    "spectral_fit",
    "exchange_ggt",
    "exchange_random",
    "init_places_the_state",
    "memory_of_a_device",
    "types_of_the_state",
)
PROCESSES = {2: ("train_auto_fsdp", "spectral_fit"), 4: ("basis_eigen",)}


def launch(arguments, devices):
    """A process on CPU; compiled functions are kept beside those of the rest of the suite."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
    }
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def assert_right(processes, names):
    """Every process made every check, and none found anything wrong."""
    try:
        outputs = [p.communicate(timeout=900) for p in processes]
    finally:
        for process in processes:
            process.kill()
    for out, err in outputs:
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert tuple(x["name"] for x in lines) == names, err[-3000:]
        wrong = [f"{x['name']}: {x['wrong']}" for x in lines if x["wrong"]]
        assert not wrong, "\n".join(wrong)


def test_eight_devices():
    assert_right([launch(EIGHT_DEVICES, 8)], EIGHT_DEVICES)


@pytest.mark.parametrize("count", PROCESSES)
def test_processes(count):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    which = lambda i: ("--process", str(i), str(count), str(port), *PROCESSES[count])
    assert_right([launch(which(i), 1) for i in range(count)], PROCESSES[count])
