"""A campaign of faults: what is done to the library, how often, and how often it failed.

* Killed: a process trains a flax network, saves to orbax in the background every third step (or
  writes `lro.spectral.fit`'s file), and is killed by signal 9 at a random moment, several times,
  each time to be started anew; parameters and state at the end are those of a process that was left
  alone, to the bit.
* Numbers: NaN, infinite, huge, denormal and zero entries in a tenth of the gradients of 400 steps,
  in float32, bfloat16 and float16, for every basis, every curvature, matrices, learners and
  trackers; ``value_fn`` and other arguments that give NaN. All updates are finite, all state is,
  and the last twenty steps, which are sound, move.
* Streams: 10,000 gradients that are dependent, repeat, alternate, jump by 1e20, grow and fade over
  34 decades, or answer the basis, for every basis; finite, and orthonormal to the bound printed.
* Trees: random shapes, dtypes, structures and products of parts, three steps each.
* Long: 100,000 steps; norms of updates in the last tenth over those in the second, and a
  step with every counter at its end.
* Same: the same seed in processes with other hash seeds and numbers of threads, to the bit.

The seed draws everything. Budgets are fixed: trials, not time.

Every part is written as soon as it is done, beside what the file has of the others.

    python benchmarks/faults.py [--quick] [--seed 0] [--only killed,streams] [--out DIR]
"""

import argparse
import collections
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import trials
from cases import (
    BASES,
    CURVATURES,
    DEFAULT,
    INNERS,
    MORE_BASES,
    RULES,
    TRACKERS,
    combinations,
)

import lowrank_optax as lro

TESTS = Path(trials.__file__).parent
COVARIANCE = lro.curvature.Covariance()
ALL = BASES | MORE_BASES | RULES
SMALL_TRACKERS = {
    name: make(3, 128)
    for name, (make, _) in TRACKERS.items()
    if name not in ("Oja, 20 at once", "Brand, m = r")
}
MATRICES = {
    "soap": lro.soap(1e-2),
    "soap_muon": lro.soap_muon(1e-2),
    "galore": lro.galore(1e-2, rank=2),
    "eigen sides": lro.scale_by_matrix_lre(
        lro.basis.Eigen(2), lro.basis.Eigen(2), lro.inner.Adam()
    ),
}
LEARNERS = {
    "reconstruction": lro.online.learner(3),
    "dynamics": lro.online.learner(3, (lro.online.Dynamics(),), optax.adam(1e-2)),
    "entropy": lro.online.learner(3, (lro.online.Entropy(),)),
    "whitening": lro.online.learner(3, (lro.online.Whitening(),), optax.adam(1e-2)),
}


class Count:
    """Trials and failures by fault; failures are printed as they come."""

    def __init__(self):
        self.rows = collections.defaultdict(lambda: {"trials": 0, "failures": 0})

    def __call__(self, fault, case, ok, **more):
        row = self.rows[fault]
        row["trials"] += 1
        row["failures"] += not ok
        for key, value in more.items():
            row[key] = max(row.get(key, 0.0), float(value))
        if not ok:
            print(f"FAILED {fault}: {case} {more or ''}", flush=True)


def main():
    args = arguments()
    path = Path(args.out) / ("faults_quick.json" if args.quick else "faults.json")
    found = json.loads(path.read_text())["parts"] if path.exists() else {}
    failures = 0
    for i, name in enumerate(PARTS):
        if name not in args.only:
            continue
        count, begin = Count(), time.perf_counter()
        bounds = PARTS[name](count, np.random.default_rng([args.seed, i]), args)
        found[name] = {
            "seed": args.seed,
            "seconds": time.perf_counter() - begin,
            "rows": [{"fault": fault} | row for fault, row in count.rows.items()],
        } | ({"orthogonality": bounds} if bounds else {})
        failures += sum(row["failures"] for row in count.rows.values())
        report.save(path, parts=found)
        print(f"{name}: {found[name]['seconds']:.0f} s", flush=True)
    rows = [row for name in args.only for row in found[name]["rows"]]
    columns = {"fault": "fault", "trials": "trials", "failures": "failures"}
    report.show(f"seed {args.seed}", rows, columns)
    if "streams" in args.only:
        columns = {"basis": "basis", "bound": "largest |Q^T Q - 1|", "stream": "on the stream"}
        bounds = found["streams"]["orthogonality"]
        report.show("orthogonality", [{"basis": k} | v for k, v in bounds.items()], columns)
    sys.exit(failures > 0)


def few(args, mapping, count=2):
    """All entries, or with ``--quick`` the first of them."""
    return dict(list(mapping.items())[:count]) if args.quick else mapping


def finite(tree):
    return all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in jax.tree.leaves(tree))


# Numbers ----------------------------------------------------------------------------------------


def arguments_of(params, bad):
    """Everything a curvature may ask for; where ``bad`` all of it is NaN."""
    hurt = lambda x: x * jnp.where(bad, jnp.nan, 1)
    flat = lambda p: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(p)])
    value_fn = lambda p: hurt(jnp.sum((flat(p) - 0.3) ** 4 + flat(p) ** 2))
    vector = lambda p: hurt(flat(p)[:3] ** 2 - 0.1)
    return {
        "value_fn": value_fn,
        "value": value_fn(params),
        "losses_fn": vector,
        "residuals_fn": vector,
    }


def runner(tx, dtype=jnp.float32):
    """All steps at once: updates, norms, and the state at the end."""

    def step(carry, given):
        params, state = carry
        g, bad = given
        g = jax.tree.map(lambda x: x.astype(dtype), g)
        updates, state = tx.update(g, state, params, **arguments_of(params, bad))
        # However large an update is, the loss is to be one that the dtype can hold.
        small = lambda u: jnp.clip(1e-2 * u, -0.1, 0.1).astype(dtype)
        moved = jax.tree.map(lambda p, u: p - small(u), params, updates)
        return (moved, state), updates

    start = jax.tree.map(lambda x: jnp.asarray(x, dtype), trials.tree(np.zeros(trials.SIZE)))
    return jax.jit(lambda g, bad: jax.lax.scan(step, (start, tx.init(start)), (g, bad)))


def judged(count, fault, case, out, lowest=20):
    """Finite updates and state, and that the last steps move."""
    (_, state), updates = out
    moves = [np.abs(np.asarray(u, np.float32))[-lowest:] for u in jax.tree.leaves(updates)]
    moves = np.mean([np.any(u.reshape(lowest, -1), axis=1) for u in moves]) > 0
    ok = finite(updates) and trials.whole(state) and moves
    count(fault, f"{case}: finite {finite(updates)}, {trials.whole(state)}, moves {moves}", ok)


def numbers(count, rng, args):
    times, steps = (1, 100) if args.quick else (5, 400)
    options = [{}, {"update_every": 3}]
    no = np.zeros(steps, bool)
    for name, basis in few(args, ALL).items():
        for extra in options[: 1 if args.quick else 2]:
            tx = lro.scale_by_lre(COVARIANCE, basis, DEFAULT, **extra)
            run = runner(tx)
            for trial in range(times):
                g = trials.tree(trials.spoiled(rng, steps, 0.1))
                judged(count, "spoiled gradients, bases", f"{name} {extra} {trial}", run(g, no))
    for dtype in () if args.quick else (jnp.bfloat16, jnp.float16):
        for name, basis in ALL.items():
            run = runner(lro.scale_by_lre(COVARIANCE, basis, DEFAULT), dtype)
            g = trials.spoiled(rng, steps, 0.1)
            case = f"{name} {dtype.__name__}"
            judged(count, "the same in 16 bits", case, run(trials.tree(g), no))
    for name, curvature in few(args, CURVATURES).items():
        if curvature.needs & {"complement"}:
            continue  # there is no step to learn from without one; `bfgs` has the same algebra
        for extra in options[: 1 if args.quick else 2]:
            tx = lro.scale_by_lre(curvature, BASES["eigen"], DEFAULT, complement=0.1, **extra)
            run = runner(tx)
            for trial in range(times):
                bad = rng.random(steps) < 0.1
                bad[-20:] = False
                g = trials.tree(trials.spoiled(rng, steps, 0.1))
                judged(count, "arguments that give NaN", f"{name} {extra} {trial}", run(g, bad))
    for name, tx in few(args, MATRICES, 1).items():
        run = runner(tx)
        for trial in range(times):
            g = trials.tree(trials.spoiled(rng, steps, 0.1))
            judged(count, "spoiled gradients, matrices", f"{name} {trial}", run(g, no))
    for name, learner in few(args, LEARNERS, 2).items():
        state = learner.init(jax.random.key(0), np.zeros(trials.SIZE, np.float32))
        run = jax.jit(functools.partial(jax.lax.scan, learner.update))
        for size in (4,) if args.quick else (1, 4):
            for trial in range(times):
                flat = trials.spoiled(rng, steps, 0.1).reshape(-1, size, trials.SIZE)
                end, _ = run(state, flat)
                middle = run(state, flat[: len(flat) - 20 // size])[0]
                goes_on = int(end.count) > int(middle.count)
                ok = trials.whole(end) and goes_on
                count("spoiled vectors, learners", f"{name} {size} {trial} {goes_on}", ok)
    for name, tracker in few(args, SMALL_TRACKERS, 2).items():
        state = tracker.init(jax.random.key(0), np.zeros(trials.SIZE, np.float32))
        update = jax.jit(tracker.update)
        for trial in range(times):
            flat = trials.spoiled(rng, steps, 0.1)
            middle = update(state, flat[:-20])
            end = update(middle, flat[-20:])
            goes_on = int(end.seen) > int(middle.seen)
            ok = trials.whole(end.memory) and finite(tracker.operator(end).rows) and goes_on
            count("spoiled vectors, trackers", f"{name} {trial} {goes_on}", ok)


# Streams ----------------------------------------------------------------------------------------

BOUNDS = {"ggt": 5e-2, "common_directions": 5e-2, "low_rank_factor": 5e-2} | dict.fromkeys(
    ("drop_oldest", "drop_smallest"), 5e-2
)
"""Of bases that go through a Gram matrix of their columns; all others are held to 1e-5."""


def streams(count, rng, args):
    steps, worst = (1000 if args.quick else 10_000), {}
    for name, basis in few(args, ALL, 2).items():
        plain, found = jax.jit(trials.watch(basis, DEFAULT)), {}
        for stream, make in trials.STREAMS.items():
            found[stream] = plain(trials.tree(make(rng, steps)))
        noise = trials.tree(rng.normal(size=(steps, trials.SIZE)))
        for stream, reply in few(args, trials.REPLIES, 1).items():
            found[stream] = jax.jit(trials.watch(basis, DEFAULT, reply))(noise)
        worst[name] = {"bound": 0.0, "stream": ""}
        for stream, ((_, state), (updates, pictures)) in found.items():
            error = float(np.max(trials.orthogonality(pictures)))
            ok = finite(updates) and trials.whole(state) and error < BOUNDS.get(name, 1e-5)
            lost = sum(int(n[0]) for n in state.events) - int(state.events.zero[0])
            count("streams", f"{name}, {stream}: {error:.1e}, lost {lost}", ok and lost <= 2)
            if error > worst[name]["bound"]:
                worst[name] = {"bound": error, "stream": stream}
    return worst


# Killed processes -------------------------------------------------------------------------------


def killed(count, rng, args):
    from test_checkpoints import final, run
    from trainee import OPTIMIZERS

    kinds = ["whitening"] if args.quick else [*OPTIMIZERS, "learner", "fit"]
    steps, kills = (18, 2) if args.quick else (60, 6)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        for kind in kinds:
            run(kind, place / f"{kind} whole", steps)
            done = 0
            while done < kills and not run(
                kind,
                place / f"{kind} killed",
                steps,
                # After some lines, in the middle of a save as often as between two.
                (int(rng.integers(1, 8)), float(rng.choice([0, rng.uniform(0, 0.1)]))),
            ):
                done += 1
                count("killed by signal 9", kind, True)
            run(kind, place / f"{kind} killed", steps)
            ends = (final(place / f"{kind} {how}") for how in ("whole", "killed"))
            same = all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))
            count("resumed to the same end", f"{kind} after {done} kills", same)


# Trees and products -----------------------------------------------------------------------------


def trees(count, rng, args):
    import hypothesis
    from hypothesis import strategies as st

    names = list(combinations())
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    dtypes = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])
    leaf = st.builds(lambda shape, dtype: jnp.full(shape, 0.5, dtype), shapes, dtypes)
    structure = st.recursive(
        st.one_of(leaf, st.none(), st.just(optax.MaskedNode())),
        lambda x: st.one_of(
            st.lists(x, max_size=3),
            st.dictionaries(st.sampled_from("abc"), x, max_size=3),
            st.tuples(x, x),
        ),
        max_leaves=5,
    )

    @hypothesis.seed(args.seed)
    @hypothesis.settings(
        max_examples=5 if args.quick else 80,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(structure, st.sampled_from(names), st.booleans(), st.sampled_from([1, 3]))
    def attempt(tree, parts, per_leaf, every):
        measured, kept, inside = parts
        if kept == "learned":
            return  # needs at least as many entries as its rank
        tx = lro.scale_by_lre(
            CURVATURES[measured],
            (BASES | MORE_BASES)[kept],
            INNERS[inside],
            groups=lro.per_leaf if per_leaf else None,
            update_every=every,
            complement=0.1,
        )

        def step(state, i):
            extra = arguments_of_tree(tree)
            g = jax.tree.map(lambda x: x * (1 + 0.1 * i).astype(x.dtype), tree)
            updates, state = tx.update(g, state, tree, **extra)
            return state, updates

        ok, why = True, ""
        try:
            state, updates = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(3.0)))(
                tx.init(tree)
            )
            fits = lambda u, x: u.dtype == x.dtype and u.shape[1:] == x.shape
            same = jax.tree.map(fits, updates, tree)
            ok = finite(updates) and trials.whole(state) and all(jax.tree.leaves(same))
        except Exception as error:  # any is a failure, and is to be shown with what caused it
            ok, why = False, f"{type(error).__name__}: {str(error)[:300]}"
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
        count("trees and products", f"{parts} {per_leaf} {every} {shapes} {why}", ok)

    attempt()


def arguments_of_tree(tree):
    flat = lambda p: sum(
        (jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(p)), jnp.zeros(())
    )
    vector = lambda p: jnp.stack([flat(p), 2 * flat(p), flat(p) + 1])
    return {
        "value_fn": flat,
        "value": jnp.ones(()),
        "losses_fn": vector,
        "residuals_fn": vector,
    }


# Long runs --------------------------------------------------------------------------------------


def long(count, rng, args):
    steps = 10_000 if args.quick else 100_000
    g = jax.tree.map(jnp.asarray, trials.tree(rng.normal(size=(1000, trials.SIZE))))
    flat_norm = lambda tree: jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))
    for name, basis in few(args, ALL, 2).items():
        tx = lro.scale_by_lre(COVARIANCE, basis, DEFAULT)
        params = trials.tree(np.zeros(trials.SIZE))

        def step(state, i, tx=tx, params=params):
            now = jax.tree.map(lambda x: x[(i * 7919) % 1000], g)
            updates, state = tx.update(now, state, params)
            return state, flat_norm(updates)

        run = jax.jit(lambda s, i, step=step: jax.lax.scan(step, s, i))
        state, norms = run(tx.init(params), jnp.arange(steps))
        tenth = steps // 10
        drift = float(np.mean(norms[-tenth:]) / np.mean(norms[tenth : 2 * tenth]))
        ok = finite(norms) and trials.whole(state) and 0.5 < drift < 2
        ok = ok and int(state.count) == int(state.steps[0]) == steps
        count("long runs", f"{name}: drift {drift:.3f}", ok, drift=abs(np.log(drift)))
        end, after = run(trials.aged(state, 2**31 - 2), jnp.arange(1000))
        ratio = float(np.mean(after) / np.mean(norms[-1000:]))
        ok = finite(after) and trials.whole(end) and 0.3 < ratio < 3 and int(end.count) > 0
        count("counters at their end", f"{name}: {ratio:.2f}", ok)


# Determinism ------------------------------------------------------------------------------------

PROGRAM = """
import sys, hashlib
sys.path[:0] = {paths!r}
import jax, numpy as np
import trainee
state, step = trainee.learner() if {kind!r} == "learner" else trainee.optimizer({kind!r})
step = jax.jit(step)
for i in range({steps}):
    state = step(state, i)
leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]
print(hashlib.sha256(b"".join(leaves)).hexdigest())
"""


def same(count, rng, args):
    from trainee import OPTIMIZERS

    kinds = ["whitening"] if args.quick else [*OPTIMIZERS, "learner"]
    settings = {
        "the same again": {},
        "another hash seed": {"PYTHONHASHSEED": str(rng.integers(1, 2**31))},
        "OpenBLAS with 2 threads": {"OPENBLAS_NUM_THREADS": "2"},
        # Not xla_cpu_multi_thread_eigen=false, which takes other products of matrices altogether.
        "XLA with one thread": {"NPROC": "1"},
    }
    for kind in kinds:
        expected = digest(kind, {"PYTHONHASHSEED": "0"})
        for name, change in few(args, settings, 2).items():
            got = digest(kind, {"PYTHONHASHSEED": "0"} | change)
            count(f"same bits: {name}", kind, got == expected)


def digest(kind, environment):
    code = PROGRAM.format(paths=[str(TESTS), *sys.path], kind=kind, steps=20)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def arguments():
    parser = argparse.ArgumentParser(description="What is done to the library, and what failed.")
    parser.add_argument("--quick", action="store_true", help="a little of everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=lambda s: s.split(","), default=list(PARTS))
    parser.add_argument("--out", default="benchmarks/results")
    return parser.parse_args()


PARTS = {
    "numbers": numbers,
    "streams": streams,
    "killed": killed,
    "trees": trees,
    "long": long,
    "same": same,
}

if __name__ == "__main__":
    main()
