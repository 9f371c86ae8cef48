"""Runs cut off: killed processes, recorded states, states of other optimizers."""

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
COVARIANCE = lro.curvature.Covariance()

OPTIMIZERS = {
    "lre": lro.lre(0.1, basis=lro.basis.GGT(4)),
    "whitening": optax.chain(
        lro.scale_by_lre(COVARIANCE, lro.basis.Eigen(3), lro.inner.LPower(-0.25), update_every=2),
        optax.adam(1e-2),
    ),
    # Two gradients of rank two span both sides; before, part of a basis is one of many.
    "soap_muon": lro.soap_muon(1e-2, update_every=1),
    "galore": lro.galore(1e-2, rank=2, update_every=3),
}


def params():
    return {"b": jnp.linspace(-1, 1, 5), "w": jnp.linspace(-1, 1, 12).reshape(3, 4)}


PARAMS = params()


def gradient(i):
    """The same whatever the parameters, of sizes a factor apart: rounding stays what it is."""
    at = lambda x: (1.0 + jnp.arange(x.size)) * (1.3 + i)
    return jax.tree.map(lambda x: (2.0**-i * jnp.sin(at(x))).reshape(x.shape), params())


def optimized(tx, steps, params, state, first=0):
    update = jax.jit(tx.update)
    for i in range(first, first + steps):
        updates, state = update(gradient(i), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


LEARNER = lro.online.learner(2, (lro.online.Dynamics(1.0),), optax.adam(1e-2))
TRACKER = trackers.brand(2)
STREAM = np.sin(np.outer(np.arange(1, 9), np.arange(1, 7))).astype(np.float32)


def learned(steps, state, first=0):
    stream = jnp.asarray(STREAM[first : first + steps], float)
    return jax.lax.scan(LEARNER.update, state, stream)[0]


def tracked(steps, state, first=0):
    return jax.jit(TRACKER.update)(state, jnp.asarray(STREAM[first : first + steps], float))


STREAMING = {
    "learner": (LEARNER, learned),
    "tracker": (TRACKER, tracked),
}


# Recorded states --------------------------------------------------------------------------------

RECORDED = HERE / "checkpoint.msgpack"
"""What this version has after four steps, in float64.

It was written on one machine and is read on all, so that it tells of a state whose structure or
meaning has changed. Where that was the intention, old checkpoints are lost to users: say so in the
notes of the release, and write the file anew by ``python tests/test_checkpoints.py``.
"""


def write_checkpoint(path=RECORDED):
    """Records the states of the version that is installed."""
    kept = {}
    for name, tx in OPTIMIZERS.items():
        after, state = optimized(tx, 4, params(), tx.init(params()))
        kept[name] = {"params": after, "state": state}
    for name, (part, run) in STREAMING.items():
        kept[name] = plain(run(4, begun(part)))
    path.write_bytes(flax.serialization.to_bytes(kept))


def begun(part):
    return part.init(jax.random.PRNGKey(0), jnp.asarray(STREAM[0], float))


def plain(state):
    """The leaves of a state whose classes flax does not know."""
    return {str(i): x for i, x in enumerate(jax.tree.leaves(state))}


def filled(like, leaves):
    return jax.tree.unflatten(
        jax.tree.structure(like), [jnp.asarray(leaves[str(i)]) for i in range(len(leaves))]
    )


def assert_close(a, b):
    """Ten thousand times what rounding in float64 makes of four steps."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-10), a, b)


def counters(state):
    """What is equal to the bit on every machine; eigenvectors may have either sign."""
    leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.integer)]
    return [np.asarray(x).tolist() for x in leaves]


@pytest.fixture(scope="module")
def recorded():
    return flax.serialization.msgpack_restore(RECORDED.read_bytes())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_from_a_recorded_state(recorded, name, x64):
    """As if it had never stopped, however that machine rounded."""
    tx, kept = OPTIMIZERS[name], recorded[name]
    like = tx.init(params())
    state = flax.serialization.from_state_dict(like, kept["state"])
    assert jax.tree.structure(state) == jax.tree.structure(like)
    shape = lambda x: (jnp.shape(x), jnp.result_type(x))
    assert jax.tree.map(shape, state) == jax.tree.map(shape, like)
    resumed, last = optimized(tx, 4, kept["params"], state, 4)
    whole, end = optimized(tx, 8, params(), like)
    assert_close(resumed, whole)
    assert counters(last) == counters(end)
    spectrum = lambda state: lro.diagnose.summary(state).spectrum
    if name == "lre":
        assert_close(spectrum(last), spectrum(end))


@pytest.mark.parametrize("name", STREAMING)
def test_a_stream_goes_on_from_a_recorded_state(recorded, name, x64):
    part, run = STREAMING[name]
    state = filled(begun(part), recorded[name])
    resumed, whole = run(4, state, 4), run(4, run(4, begun(part)), 4)
    assert counters(resumed) == counters(whole)
    dense = lambda state: part.operator(state)(jnp.eye(6))
    assert_close(dense(resumed), dense(whole))


def test_a_recorded_state_of_other_parts_is_refused(recorded, x64):
    """By flax where names differ, and by the first step where shapes do."""
    kept = recorded["lre"]["state"]
    other = lro.lre(0.1, basis=lro.basis.Eigen(4))
    with pytest.raises(ValueError, match="(?s)rows|basis|keys"):
        other.update(
            gradient(0), flax.serialization.from_state_dict(other.init(params()), kept), params()
        )
    larger = lro.lre(0.1, basis=lro.basis.GGT(5))
    state = flax.serialization.from_state_dict(larger.init(params()), kept)
    with pytest.raises(ValueError, match=r"the state holds an array .* need an array") as error:
        larger.update(gradient(0), state, params())
    assert "basis" in str(error.value) and "5" in str(error.value)


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
    made = trackers.brand(3).init(jax.random.key(0), STREAM[0])
    for other in (trackers.brand(2), trackers.PAST(3), trackers.PETRELS(3)):
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


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    write_checkpoint()
