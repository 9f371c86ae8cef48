"""Runs cut off: killed processes, files of earlier versions, states of other optimizers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.online import trackers

HERE = Path(__file__).parent
PARAMS = {"b": jnp.linspace(-1, 1, 5), "w": jnp.linspace(-1, 1, 12).reshape(3, 4)}
COVARIANCE = lro.curvature.Covariance()

OPTIMIZERS = {
    "lre": lro.lre(1.0, basis=lro.basis.GGT(4)),
    "whitening": optax.chain(
        lro.scale_by_lre(COVARIANCE, lro.basis.Eigen(3), lro.inner.LPower(-0.25), update_every=2),
        optax.adam(1e-2),
    ),
    # Its vectors went through Adam with the decays of the matrices.
    "polar_soap": lro.polar_soap(1e-2, rest=optax.scale_by_adam(0.95, 0.95)),
}


def gradient(params, i):
    return jax.tree.map(lambda x: x - 0.3 + 0.1 * jnp.sin(3 * x + i), params)


def optimized(tx, steps, params, state, first=0):
    update = jax.jit(tx.update)
    for i in range(first, first + steps):
        updates, state = update(gradient(params, i), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


LEARNER = lro.online.learner(2, (lro.online.Dynamics(1.0),), optax.adam(1e-2))
TRACKER = trackers.Brand(2)
STREAM = np.sin(np.outer(np.arange(1, 9), np.arange(1, 7))).astype(np.float32)


def learned(steps, state, first=0):
    return jax.lax.scan(LEARNER.update, state, STREAM[first : first + steps])[0]


def tracked(steps, state, first=0):
    return jax.jit(TRACKER.update)(state, STREAM[first : first + steps])


# Earlier versions -------------------------------------------------------------------------------

OLD = HERE / "checkpoint-0.1.0.msgpack"
"""What version 0.1.0 had after four steps, and after four more; made by `write_checkpoint`."""


def write_checkpoint(path=OLD):
    """Run with the version whose checkpoint is to be kept."""
    kept = {}
    for name, tx in OPTIMIZERS.items():
        params, state = optimized(tx, 4, PARAMS, tx.init(PARAMS))
        kept[name] = {"params": params, "state": state, "later": optimized(tx, 4, params, state, 4)}
    half = learned(4, LEARNER.init(jax.random.key(0), STREAM[0]))
    kept["learner"] = {"state": plain(half), "later": plain(learned(4, half, 4))}
    half = tracked(4, TRACKER.init(jax.random.PRNGKey(0), STREAM[0]))
    kept["tracker"] = {"state": plain(half), "later": plain(tracked(4, half, 4))}
    path.write_bytes(flax.serialization.to_bytes(kept))


def plain(state):
    """The leaves of a state whose classes flax does not know."""
    return {str(i): x for i, x in enumerate(jax.tree.leaves(state))}


def filled(like, leaves):
    return jax.tree.unflatten(
        jax.tree.structure(like), [jnp.asarray(leaves[str(i)]) for i in range(len(leaves))]
    )


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5), a, b)


@pytest.fixture(scope="module")
def old():
    return flax.serialization.msgpack_restore(OLD.read_bytes())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_an_earlier_version_goes_on(old, name):
    tx, kept = OPTIMIZERS[name], old[name]
    like = tx.init(PARAMS)
    state = flax.serialization.from_state_dict(like, kept["state"])
    assert jax.tree.structure(state) == jax.tree.structure(like)
    params, state = optimized(tx, 4, kept["params"], state, 4)
    assert_close(params, kept["later"]["0"])
    assert_close(flax.serialization.to_state_dict(state), kept["later"]["1"])


def test_a_recipe_that_has_changed_says_so(old):
    like = lro.polar_soap(1e-2).init(PARAMS)
    with pytest.raises(ValueError, match=r"do not match|size|keys"):
        flax.serialization.from_state_dict(like, old["polar_soap"]["state"])


def test_a_learner_of_an_earlier_version_goes_on(old):
    like = LEARNER.init(jax.random.key(1), STREAM[0])
    kept = old["learner"]
    assert_close(plain(learned(4, filled(like, kept["state"]), 4)), kept["later"])


def test_a_tracker_of_an_earlier_version_goes_on(old):
    like = TRACKER.init(jax.random.PRNGKey(1), STREAM[0])
    kept = old["tracker"]
    assert_close(plain(tracked(4, filled(like, kept["state"]), 4)), kept["later"])


# States that do not fit -------------------------------------------------------------------------


def lre(*parts, **options):
    return lro.scale_by_lre(COVARIANCE, *parts, **options)


GGT, EIGEN, ADAM = lro.basis.GGT(4), lro.basis.Eigen(4), lro.inner.Adam()
OTHERS = {
    "rank": (lre(GGT, ADAM), lre(lro.basis.GGT(5), ADAM), "(5, 5)"),
    "basis": (lre(GGT, ADAM), lre(EIGEN, ADAM), ".basis.rows"),
    "inner": (lre(GGT, ADAM), lre(GGT, lro.inner.Lion()), ".inner"),
    "rhythm": (lre(GGT, ADAM), lre(GGT, ADAM, update_every=3), ".curvature.columns"),
    "groups": (lre(GGT, ADAM), lre(GGT, ADAM, groups=lro.per_leaf), "(2,)"),
    "optax": (optax.scale_by_adam(), lre(GGT, ADAM), "ScaleByAdamState"),
    "rank of a side": (lro.galore(0.1, rank=2), lro.galore(0.1, rank=3), "(1, 3, 3)"),
    "sides": (lro.soap(0.1), lro.galore(0.1, rank=2), ".short"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_state_of_another_optimizer_is_refused(case):
    made, used, says = OTHERS[case]
    with pytest.raises(ValueError, match="init") as error:
        used.update(PARAMS, made.init(PARAMS), PARAMS)
    assert says in str(error.value), str(error.value)


def test_the_dictionary_of_a_file_is_refused():
    """What flax and orbax give back where they were given no target."""
    tx = lre(GGT, ADAM)
    bare = flax.serialization.to_state_dict(tx.init(PARAMS))
    with pytest.raises(ValueError, match="dict.*target"):
        tx.update(PARAMS, bare, PARAMS)
    with pytest.raises(ValueError, match="dict.*target"):
        LEARNER.update({}, STREAM[0])
    with pytest.raises(ValueError, match="dict.*target"):
        TRACKER.update({}, STREAM[0])


def test_the_state_of_another_learner_or_tracker_is_refused():
    made = lro.online.learner(3).init(jax.random.key(0), STREAM[0])
    with pytest.raises(ValueError, match=r"learner.update: .*\(3, 6\).*\(2, 6\)"):
        lro.online.learner(2).update(made, STREAM[0])
    with pytest.raises(ValueError, match="nothing at .memory"):
        lro.online.learner(3, (lro.online.Dynamics(),)).update(made, STREAM[0])
    made = trackers.Brand(3).init(jax.random.key(0), STREAM[0])
    for other in (trackers.Brand(2), trackers.PAST(3), trackers.PETRELS(3)):
        with pytest.raises(ValueError, match=type(other).__name__ + ": the state holds"):
            other.update(made, STREAM[0])


# Killed processes -------------------------------------------------------------------------------


def run(kind, place, steps, kill=None):
    """Trains until the end, or until a number of printed lines and then some seconds have passed.

    Returns whether it came to the end.
    """
    command = [sys.executable, str(HERE / "trainee.py"), kind, str(place), str(steps)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        if kill is not None:
            lines, seconds = kill
            for _ in range(lines):
                process.stdout.readline()
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        errors = process.communicate()[1]
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{kind}: {errors}")
    return process.returncode == 0


def final(place):
    with np.load(place / "final.npz") as data:
        return [data[name] for name in data.files]


@pytest.mark.parametrize("kind, kills", [("whitening", [(4, 0.01), (2, 0.0)]), ("fit", [(3, 0.0)])])
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(kind, kills, tmp_path):
    """Killed in its first steps, and right after a save began."""
    assert run(kind, tmp_path / "whole", 24)
    for kill in kills:
        assert not run(kind, tmp_path / "killed", 24, kill)
    assert run(kind, tmp_path / "killed", 24)
    for one, other in zip(final(tmp_path / "whole"), final(tmp_path / "killed"), strict=True):
        np.testing.assert_array_equal(one, other)
