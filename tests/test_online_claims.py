"""The benchmarks' claims in a small form: where a learned subspace beats PCA of the same rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

pytestmark = pytest.mark.filterwarnings("error")


def learn(learner, vectors, epochs=1, **streams):
    """The operator after passes over ``(updates, k, d)`` vectors and streams."""

    @jax.jit
    def follow(state):
        step = lambda state, batch: (learner.update(state, batch[0], **batch[1])[0], None)
        return jax.lax.scan(step, state, (vectors, streams))[0]

    state = learner.init(jax.random.key(7), vectors[0, 0])
    for _ in range(epochs):
        state = follow(state)
    return learner.operator(state)


def overlap(operator, rows):
    """Share of the span of orthonormal rows inside the operator's."""
    return float(jnp.sum(operator.project(rows) ** 2) / len(rows))


def test_dynamics_finds_what_is_predictable_under_louder_noise():
    d, n, rho, scales = 24, 8000, 0.97, [0.97**0.5] * 2 + [2.5] * 4 + [0.1] * 18
    e = np.random.default_rng(0).normal(size=(n, d))
    x = e.copy()
    for t in range(1, n):
        x[t, :2] = rho * x[t - 1, :2] + (1 - rho**2) ** 0.5 * e[t, :2]
    x, truth = jnp.asarray(x * scales, jnp.float32), jnp.eye(2, d)
    adam = optax.adam(optax.cosine_decay_schedule(0.03, 1000))
    learner = lro.online.learner(2, (lro.online.Dynamics(1.0),), adam, reconstruction=0)
    learned = learn(learner, x.reshape(-1, 32, d), 2)
    assert overlap(learned, truth) > 0.97
    assert overlap(lro.online.signed_pca(2, (1.0, x[::40])), truth) < 0.02


def test_old_task_finds_signed_pca():
    """The span is that of ``C + 2 F`` in closed form; PCA of the stream has nothing of ``F``."""
    keys = jax.random.split(jax.random.key(1), 2)
    scale = jnp.array([3.0, 2.0, 0.2, 0.2, 0.1, 0.1]), jnp.array([0.1, 0.2, 0.1, 2.0, 0.2, 0.1])
    v, u = (jax.random.normal(k, (500, 16, 6)) * s for k, s in zip(keys, scale, strict=True))
    adam = optax.adam(optax.cosine_decay_schedule(0.03, 1000))
    learned = learn(lro.online.learner(2, (lro.online.OldTask(2.0),), adam), v, 2, old=u)
    new, old = (jnp.linalg.qr(x.reshape(-1, 6), mode="r") for x in (v, u))
    closed = lro.online.signed_pca(2, (1.0, new), (2.0, old))
    assert overlap(learned, closed.eigenvectors()) > 0.995
    assert overlap(lro.online.signed_pca(2, (1.0, new)), jnp.eye(6)[3:4]) < 0.02


def test_edit_locality_removes_what_keys_share_with_others():
    """Two loud directions without keys cost nothing; the next two, full of keys, have to go."""
    keys = jax.random.split(jax.random.key(2), 2)
    loud, asked = jnp.repeat(jnp.array([[2.5, 2.0, 0.3], [0.0, 1.0, 1.0]]), jnp.array([2, 2, 6]), 1)
    x, k = (
        jax.random.normal(i, (400, 16, 10)) * s for i, s in zip(keys, (loud, asked), strict=True)
    )
    adam = optax.adam(optax.cosine_decay_schedule(0.03, 400))
    learner = lro.online.learner(2, (lro.online.EditLocality(1.0),), adam, reconstruction=0)
    learned = learn(learner, x, edits=k)
    assert overlap(learned, jnp.eye(10)[2:4]) > 0.95
    assert overlap(lro.online.signed_pca(2, (1.0, x[:, 0])), jnp.eye(10)[2:4]) < 0.05


def test_a_bottleneck_keeps_what_the_logits_need():
    """Logits read quieter directions: PCA keeps the louder ones and loses every answer.

    Beyond twice their variance an orthogonal projection would leak: none is then a local optimum.
    """
    v = jax.random.normal(jax.random.key(3), (400, 32, 10)) * jnp.array([1.2] * 4 + [1.0] * 6)
    w = jnp.zeros((10, 3)).at[4:6].set(jnp.array([[1.0, -0.5, -0.5], [0.0, 0.9, -0.9]]))
    head = lambda h: h @ w
    adam = optax.adam(optax.cosine_decay_schedule(0.03, 400))
    learner = lro.online.learner(2, (lro.online.Activation(1.0, head),), adam, reconstruction=0.1)
    learned, x = learn(learner, v), v.reshape(-1, 10)[:500]
    agree = lambda op: float((head(op.project(x)).argmax(1) == head(x).argmax(1)).mean())
    assert agree(learned) > 0.97
    assert agree(lro.online.signed_pca(2, (1.0, x))) < 0.6


def test_whitening_scales_the_span_of_pca():
    """``cond H = (λ_1/λ_r)(1 + λλ_r)/(1 + λλ_1)`` and nothing gained on the span."""
    variances, weight = jnp.array([9.0, 4.0, 1.0]), 2.0
    scale = jnp.sqrt(jnp.append(variances, jnp.full(5, 0.1)))
    v = jax.random.normal(jax.random.key(4), (1500, 64, 8)) * scale
    learner = lro.online.learner(
        3,
        (lro.online.Whitening(weight, relative=False),),
        optax.adam(optax.cosine_decay_schedule(0.02, 1500)),
        relative=False,
    )
    learned = learn(learner, v)
    codes = learned.encode(jnp.diag(scale))
    expected = 9 * (1 + weight) / (1 + 9 * weight)
    assert jnp.linalg.cond(codes.T @ codes) == pytest.approx(expected, rel=0.05)
    assert overlap(learned, jnp.eye(3, 8)) > 0.995
