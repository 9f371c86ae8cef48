"""The fit: faults, resuming, stopping, what it gives back."""

import dataclasses
import pickle
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax import spectral as s
from lowrank_optax.spectral import operators as ops
from lowrank_optax.spectral._fingerprint import fingerprint

OPERATOR = ops.Schrodinger(ops.Harmonic(), ops.geometric(1, 0.5, 2.0), shift=6.0)
NETWORK = s.Network(
    lambda key, x: jax.random.normal(key, (2, 2, 5)),
    lambda w, x: jnp.sum(w[0] * jnp.tanh(w[1] * x[0] + jnp.arange(5.0) - 2), axis=1),
)


def run(**options):
    small = {"steps": 40, "batch_size": 32, "evaluate_every": 10, "evaluate_batches": 2}
    options = small | {"method": s.NestedLoRA()} | options
    return s.fit(options.pop("operator", OPERATOR), options.pop("network", NETWORK), **options)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.fixture(scope="module")
def ran():
    """One fit, and what `progress` saw of it."""
    seen = []
    return run(progress=seen.append), seen


def test_resumes_bit_for_bit(tmp_path):
    """With a method that has a memory of its own."""
    method = s.ALLO()

    class Killed(Exception):
        pass

    def kill(record):
        if record["step"] == 20:
            raise Killed

    path = str(tmp_path / "fit.npz")
    whole = run(method=method)
    with pytest.raises(Killed):
        run(method=method, checkpoint=path, progress=kill)
    resumed = run(method=method, checkpoint=path)
    assert [r["step"] for r in resumed.history] == [10, 20, 30, 40]
    assert same(whole.params, resumed.params) and same(whole.moments, resumed.moments)
    again = run(method=method, checkpoint=path)  # a finished fit is read, not run
    assert same(whole.params, again.params)
    for other in ({"seed": 1}, {"operator": dataclasses.replace(OPERATOR, shift=5.0)}):
        with pytest.raises(ValueError, match="another fit"):
            run(method=method, checkpoint=path, **other)


def test_fingerprints_tell_fits_apart_and_nothing_else():
    def schedule(rate, steps=10):
        return optax.adam(optax.cosine_decay_schedule(rate, steps))

    makes = [
        lambda: OPERATOR,
        lambda: dataclasses.replace(OPERATOR, potential=ops.Harmonic(2.0)),
        lambda: ops.Koopman(np.arange(4.0)[:, None], np.ones((4, 1))),
        lambda: ops.Koopman(np.arange(4.0)[:, None], np.zeros((4, 1))),
        lambda: ops.KernelIntegral(lambda x, y, w=2.0: w * x @ y, np.ones((4, 1))),
        lambda: ops.KernelIntegral(lambda x, y, w=3.0: w * x @ y, np.ones((4, 1))),
        lambda: s.networks.MLP(2, (4, 4)),
        lambda: s.networks.MLP(2, (4, 5), features=s.networks.ScaleFeatures()),
        lambda: s.networks.MLP(2, (4, 5), features=s.networks.ScaleFeatures(seed=1)),
        lambda: schedule(1e-3),
        lambda: schedule(2e-3),
        lambda: schedule(1e-3, 11),
        lambda: optax.chain(optax.clip(1.0), schedule(1e-3)),
        lambda: lro.lre(0.02, basis=lro.basis.GGT(10)),
        lambda: lro.lre(0.02, basis=lro.basis.GGT(11)),
    ]
    told = [fingerprint(make()) for make in makes]
    assert told == [fingerprint(make()) for make in makes]
    assert len(set(told)) == len(told)
    code = "from lowrank_optax.spectral._fingerprint import fingerprint as f; import optax; "
    code += "print(f(optax.adam(optax.cosine_decay_schedule(1e-3, 10))))"
    again = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert again.strip() == fingerprint(schedule(1e-3))  # and in another process


@dataclasses.dataclass(frozen=True, eq=False)
class Failing(ops.Matrix):
    """Gives NaN for batches whose first index is a chosen one."""

    at: int = 0

    def apply(self, function, batch):
        f, tf = super().apply(function, batch)
        return f, jnp.where(batch[0] == self.at, jnp.nan, tf)


TABLE = (lambda key, i: jax.random.normal(key, (4, 2)), lambda rows, i: rows[i])


def test_a_step_that_is_not_finite_changes_nothing():
    operator = Failing(np.diag([4.0, 2, 1, 0.5]), at=3)
    adam = optax.adam(optax.cosine_decay_schedule(0.05, 400))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its evaluations meet the index too
        found = s.fit(operator, TABLE, optimizer=adam, steps=400, evaluate_batches=1, batch_size=8)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.params))


def test_nan_stops_with_the_last_good_parameters():
    bad = Failing(np.diag([4.0, 2, 1, 0.5]), at=0)  # the first index of every evaluation
    with pytest.warns(RuntimeWarning, match="not finite|diverge"):
        found = run(operator=bad, network=TABLE)
    assert "stopped at step" in found.message and found.step == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.params))


def test_divergence_stops_with_the_parameters_before():
    with pytest.warns(RuntimeWarning, match="diverge|not finite"):
        found = run(optimizer=optax.sgd(-0.2), steps=4000, evaluate_every=20, ema=0.0)
    assert found.step < 4000 and f"step {found.step}" in found.message
    assert np.isfinite(found.eigenvalues).all()


def test_patience_stops_a_fit_that_stands_still():
    still = ops.Schrodinger(ops.Harmonic(), ops.gaussian(1, 1.0))  # its points do not adapt
    found = run(operator=still, optimizer=optax.sgd(0.0), patience=2, steps=1000)
    assert found.step == 30 and "no better" in found.message


def test_progress_and_history(ran):
    found, seen = ran
    assert tuple(seen) == found.history
    assert {"step", "seconds", "eigenvalues", "raw", "score", "norm", "efficiency"} == seen[
        0
    ].keys()
    assert 0 < seen[-1]["efficiency"] <= 1


def test_two_sides_and_our_optimizers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 2))
    y = 0.9 * x[:, :1] + 0.4 * rng.normal(size=(2000, 1))
    found = s.fit(
        ops.CanonicalDependence(x, y),
        (s.networks.MLP(1, (16,)), s.networks.MLP(1, (16,), shared=True)),
        method=s.NestedLoRA(s.JointNesting()),
        optimizer=lro.lre(0.02, basis=lro.basis.GGT(10)),
        steps=150,
        batch_size=256,
    )
    correlation = 0.9 / np.hypot(0.9, 0.4)
    np.testing.assert_allclose(found.singular_values, [1, correlation], atol=0.04)
    assert np.corrcoef(found(x)[:, 1], x[:, 0])[0, 1] ** 2 > 0.95
    assert np.corrcoef(found(y, side=1)[:, 1], y[:, 0])[0, 1] ** 2 > 0.95


def test_errors_cover_the_noise_of_the_evaluation(ran):
    """The jackknife's error against the spread over evaluations with other keys."""
    from lowrank_optax.spectral.decomposition import functions_of
    from lowrank_optax.spectral.methods import moments

    found = ran[0]

    @jax.jit
    def one(key):
        batch = OPERATOR.sample(key, 64, OPERATOR.init())
        return moments((OPERATOR.apply(*functions_of(found.networks, found.params), batch),))

    keys = jax.random.split(jax.random.key(7), (60, 16))
    many = jax.lax.map(jax.vmap(one), keys)
    read = [
        s.Decomposition.of(
            OPERATOR, found.networks, found.params, jax.tree.map(lambda a, i=i: a[i], many)
        )
        for i in range(60)
    ]
    spread = np.std([d.eigenvalues for d in read], 0)
    errors = np.mean([d.errors for d in read], 0)
    np.testing.assert_allclose(errors, spread, rtol=0.4)


def test_modes_are_normal_and_ritz_modes_diagonalise(ran):
    found = ran[0]
    np.testing.assert_allclose(np.diagonal(found.gram), 1, rtol=1e-6)
    np.testing.assert_allclose(found.gram, np.eye(2), atol=1e-6)
    raw = found.raw()
    np.testing.assert_allclose(np.diagonal(raw.gram), 1, rtol=1e-6)
    assert abs(raw.gram[0, 1]) > 1e-3  # outputs as they are, and the span's best value above them
    assert found.eigenvalues[0] > raw.eigenvalues[0]
    np.testing.assert_allclose(raw.ritz().rotation, found.rotation)
    assert (np.diff(found.eigenvalues) <= 0).all()
    assert "Decomposition(" in repr(found)


def test_save_and_load(tmp_path, ran):
    path, found = str(tmp_path / "found.npz"), ran[0]
    found.save(path)
    read = s.Decomposition.load(path, OPERATOR, NETWORK)
    x = np.linspace(-1, 1, 5)[:, None]
    np.testing.assert_array_equal(found(x), read(x))
    np.testing.assert_array_equal(found.eigenvalues, read.eigenvalues)
    assert read.history == found.history and read.step == 40
    with pytest.raises(ValueError, match="network"):
        s.Decomposition.load(path, OPERATOR, s.networks.MLP(3, (4,)))


def test_metrics():
    f = np.linalg.qr(np.asarray(jax.random.normal(jax.random.key(0), (30, 4)), np.float64))[0]
    turn = np.linalg.qr(np.asarray(jax.random.normal(jax.random.key(1), (2, 2)), np.float64))[0]
    assert s.subspace_distance(f[:, :2] @ turn, 3 * f[:, :2]) < 1e-12
    np.testing.assert_allclose(s.subspace_distance(f[:, :2], f[:, 2:]), 1)
    np.testing.assert_allclose(s.align(f[:, :2] @ turn, f[:, :2]), f[:, :2], atol=1e-12)
    tilted = np.cos(0.1) * f[:, :1] + np.sin(0.1) * f[:, 1:2]
    np.testing.assert_allclose(s.angles(-tilted, f[:, :1]), 0.1)
    weights = np.linspace(1, 2, 30)
    moved = f / np.sqrt(weights)[:, None]
    np.testing.assert_allclose(s.subspace_distance(moved[:, :2], moved[:, 2:], weights), 1)


def test_estimator_is_a_transformer():
    from sklearn.base import clone
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kernel = lambda x, y: jnp.exp(-jnp.sum((x - y) ** 2) / 4)
    model = s.estimator.SpectralEmbedding(
        lambda x: ops.KernelIntegral(kernel, x), n_components=2, steps=100, batch_size=64
    )
    x = np.random.default_rng(0).normal(size=(128, 2)).astype(np.float32)
    piped = make_pipeline(StandardScaler(), clone(model)).fit(x)
    z = piped.transform(x)
    fitted = piped[-1]
    assert fitted.decomposition_.networks[0] == s.networks.default(
        ops.KernelIntegral(kernel, piped[0].transform(x)), 2
    )
    # The score on new data is what the model leaves of the kernel's matrix, by all of its pairs
    # within batches; on the data themselves it is near the squared eigenvalues.
    again = np.random.default_rng(1).normal(size=(512, 2)).astype(np.float32)
    np.testing.assert_allclose(piped.score(again), np.sum(fitted.eigenvalues_**2), rtol=0.25)
    assert z.shape == (128, 2) and fitted.eigenvalues_.shape == fitted.errors_.shape == (2,)
    np.testing.assert_allclose(z.T @ z / 128, np.eye(2), atol=0.25)


def gaussian_kernel(x, y):
    return jnp.exp(-jnp.sum((x - y) ** 2) / 4)


def kernel_operator(x):
    return ops.KernelIntegral(gaussian_kernel, x)


def test_a_fitted_estimator_pickles_and_takes_the_random_states_of_scikit_learn():
    x = np.random.default_rng(0).normal(size=(32, 2)).astype(np.float32)
    embed = lambda state: s.estimator.SpectralEmbedding(
        kernel_operator, steps=2, batch_size=16, random_state=state
    )
    fitted = embed(np.random.default_rng(3)).fit(x)
    back = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(back.transform(x), fitted.transform(x))
    np.testing.assert_array_equal(back.errors_, fitted.errors_)
    assert fitted.decomposition_(x[:0]).shape == (0, 2)
    seeds = [
        s.estimator._seed(make(i))
        for make in (np.random.default_rng, np.random.RandomState)
        for i in (0, 0, 1)
    ]
    assert seeds[0] == seeds[1] != seeds[2] and seeds[3] == seeds[4] != seeds[5]
    assert s.estimator._seed(np.int64(7)) == 7
    assert isinstance(s.estimator._seed(None), int)
    with pytest.raises(ValueError, match="random_state is 'now'; pass a number"):
        embed("now").fit(x)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: run(steps=0), "steps"),
        (lambda: run(ema=1.0), "ema"),
        (lambda: run(patience=0), "patience"),
        (lambda: run(network=lambda x: x), "network"),
        (lambda: run(network=(NETWORK, NETWORK)), "one"),
        (lambda: run(batch_size=1), "2"),
        (lambda: s.JointNesting((1.0, -1.0)), "positive"),
        (lambda: s.JointNesting((1.0,)).masks(2), "modes"),
        (lambda: s.SpIN(decay=1.0), "decay"),
        (lambda: s.TracePenalty(0.0), "penalty"),
        (lambda: s.UStatistic(0), "group"),
        (
            lambda: s.fit(
                ops.CanonicalDependence(np.ones((4, 1)), np.ones((4, 1))), NETWORK, method=s.SpIN()
            ),
            "self-adjoint",
        ),
        (lambda: s.relative_error([1.0], [1.0, 2.0]), "shapes"),
    ],
)
def test_wrong_values_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_batches_of_everything_need_moments_of_everything():
    operator = ops.Matrix(jnp.eye(3), everything=True)
    table = (lambda key, i: jnp.ones((3, 2)), lambda rows, i: rows[i])
    with pytest.raises(ValueError, match="moments=WholeBatch"):
        s.fit(operator, table, steps=1, method=s.NestedLoRA())
    assert "WholeBatch" in s.fit(operator, table, steps=1).method  # which the default chooses


def test_statistics_of_pairs_leave_out_whole_samples():
    """Rows 2i and 2i + 1 of these operators are one sample read in both directions."""
    x = np.ones((8, 1))
    for operator in (ops.Koopman(x, x), ops.GraphLaplacian(np.array([[0, 1], [1, 2]]))):
        with pytest.raises(ValueError, match=r"pass UStatistic\(2\)"):
            s.fit(operator, NETWORK, method=s.NestedLoRA(moments=s.UStatistic()))
    f, tf = ops.Koopman(x, x).apply(lambda x: x, (x, 2 * x))
    np.testing.assert_array_equal(f.reshape(8, 2, 2)[:, ::-1], tf.reshape(8, 2, 2))


def test_singular_values_are_positive():
    """Functions that came with opposite signs are turned to agree."""
    operator = ops.RectangularMatrix(np.diag([3.0, 2.0]), everything=True)
    rows = s.Network(lambda key, i: (), lambda p, i: jnp.eye(2)[i] * jnp.array([1.0, -1.0]))
    plain = s.Network(lambda key, i: (), lambda p, i: jnp.eye(2)[i])
    f, tg, g, tf = operator.apply(
        *(lambda i, n=n: n.apply((), i) for n in (rows, plain)), (jnp.arange(2), jnp.arange(2))
    )
    seen = jax.tree.map(lambda a: a[None], s.methods.moments(((f, tg), (g, tf))))
    found = s.Decomposition.of(operator, (rows, plain), ((), ()), seen)
    np.testing.assert_allclose(found.singular_values, [3, 2], rtol=1e-6)
    left, right = found(np.arange(2)), found(np.arange(2), side=1)
    np.testing.assert_allclose((left * found.singular_values) @ right.T / 2, np.diag([3, 2]))


def read_of(matrix, f, **rest):
    """The reading of functions given by their values at every index."""
    f, n = np.asarray(f, np.float64), len(f)
    image = matrix @ f
    seen = s.SideMoments(f.T @ f / n, f.T @ image / n, image.T @ image / n)
    seen = jax.tree.map(lambda a: a[None], seen)
    return s.Decomposition.of(ops.Matrix(matrix, everything=True), (), (), (seen,), **rest)


def test_what_is_read_is_the_best_of_the_span():
    """Mixed outputs: quotients one by one are off, and what is read is not."""
    matrix, mix = np.diag([5.0, 3.0, 1.0, 0.0]), np.array([[1.0, 1, 0], [0, 1, 1], [0, 0, 1]])
    found = read_of(matrix, np.eye(4)[:, :3] @ mix)
    np.testing.assert_allclose(found.eigenvalues, [5, 3, 1], atol=1e-9)
    np.testing.assert_allclose(found.gram, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(found.raw().eigenvalues, [5, 4, 2])
    np.testing.assert_allclose(found.raw().ritz().eigenvalues, found.eigenvalues)


def test_residuals_bound_eigenvalues_where_nothing_is_sampled():
    """An eigenvalue lies within each error, and modes that do not exist do not count as found."""
    rng = np.random.default_rng(0)
    matrix = np.diag([3.0, 2, 1, 0, 0, 0, 0, 0])
    f = np.eye(8)[:, :5] + 0.05 * rng.normal(size=(8, 5))
    found = read_of(matrix, f, least=0.0)
    apart = np.abs(found.eigenvalues[:, None] - np.diag(matrix)).min(1)
    assert (apart <= found.errors).all() and found.errors.min() > 0
    np.testing.assert_array_equal(found.converged, [True, True, True, False, False])
    assert repr(found).count("not converged") == 1
    exact = read_of(matrix, np.eye(8)[:, [0, 1, 1]])  # an output that depends on another
    np.testing.assert_array_equal(exact.converged, [True, True, False])
    rows, columns = rng.normal(size=(6, 2)), rng.normal(size=(4, 2))
    k = rng.normal(size=(6, 4))
    tg, tf = (6 / 4) ** 0.5 * k @ columns, (4 / 6) ** 0.5 * k.T @ rows
    seen = jax.tree.map(
        lambda a: np.asarray(a, np.float64)[None],
        s.methods.moments(((rows, tg), (columns, tf))),
    )
    found = s.Decomposition.of(ops.RectangularMatrix(k, everything=True), (), (), seen)
    truth = np.linalg.svd(k)[1]
    assert (np.abs(found.singular_values[:, None] - truth).min(1) <= found.errors).all()


def test_values_that_move_are_not_converged():
    moments = s.SideMoments(*(np.stack([np.diag(x)] * 4) for x in ([1.0, 1], [4, 2], [16, 4])))
    history = tuple({"step": i, "eigenvalues": v} for i, v in ((50, [4.0, 1.2]), (100, [4.0, 2.0])))
    operator = ops.Koopman(np.ones((4, 1)), np.ones((4, 1)))  # whose images have no residual
    found = s.Decomposition.of(operator, (), (), (moments,), step=100, history=history)
    np.testing.assert_allclose(found.movement, [0, 0.8])
    np.testing.assert_allclose(found.errors, [0, 0.8])
    np.testing.assert_array_equal(found.converged, [True, False])
