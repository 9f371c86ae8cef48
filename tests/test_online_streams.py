"""Streams: vectors from a model and a batch, against explicit Jacobians and Hessians."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import lowrank_optax as lro
from lowrank_optax.online import streams

MODEL = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)])
X = np.random.default_rng(0).normal(size=(6, 5))
Y = np.array([0, 1, 2, 0, 1, 1])


@pytest.fixture
def problem(x64):
    """Parameters as a tree and as a vector, and the way back."""
    params = MODEL.init(jax.random.key(0), X)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    flat, unravel = ravel_pytree(params)
    return params, flat, unravel


def cross_entropy(logits, y):
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(y, 3), axis=-1))


def loss(params, batch):
    return cross_entropy(MODEL.apply(params, batch[0]), batch[1])


def flatten(tree):
    """``(k, d)``."""
    return np.asarray(jax.vmap(lambda t: ravel_pytree(t)[0])(tree))


def directions(unravel, flat, k=3):
    v = np.random.default_rng(1).normal(size=(k, flat.size))
    return v, jax.vmap(unravel)(jnp.asarray(v))


def test_gradients_of_parts_and_examples(problem):
    params, flat, unravel = problem
    by_parts = flatten(jax.jit(lambda p: streams.gradients(loss, p, (X, Y), parts=3))(params))
    grad = jax.jit(jax.grad(lambda p, x, y: loss(unravel(p), (x, y))))
    each = np.stack([grad(flat, X[i : i + 2], Y[i : i + 2]) for i in (0, 2, 4)])
    np.testing.assert_allclose(by_parts, each, atol=1e-12)

    one = lambda params, example: loss(params, jax.tree.map(lambda x: x[None], example))
    losses = lambda p: jnp.stack([one(unravel(p), (X[i], Y[i])) for i in range(6)])
    jacobian = jax.jit(jax.jacobian(losses))(flat)
    for chunk in (None, 4):
        found = jax.jit(lambda p, c=chunk: streams.per_example_gradients(one, p, (X, Y), c))(params)
        np.testing.assert_allclose(flatten(found), jacobian, atol=1e-12)


def test_hessian_vector_products(problem):
    params, flat, unravel = problem
    v, tree = directions(unravel, flat)
    product = lambda p, v: streams.hessian_vector_products(lambda p: loss(p, (X, Y)), p, v)
    found = jax.jit(product)(params, tree)
    hessian = jax.jit(jax.hessian(lambda p: loss(unravel(p), (X, Y))))(flat)
    np.testing.assert_allclose(flatten(found), v @ hessian, atol=1e-10)


def test_fisher_vector_products(problem):
    """The Fisher matrix of a softmax: the mean of ``J^T (diag(p) - p p^T) J``, not of labels."""
    params, flat, unravel = problem
    v, tree = directions(unravel, flat)
    model = lambda p: MODEL.apply(p, X)
    jacobian = jax.jit(jax.jacobian(lambda p: model(unravel(p))))(flat)
    p = jax.nn.softmax(model(params))
    f = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None]
    fisher = jnp.einsum("nad,nab,nbe->de", jacobian, f, jacobian) / len(X)
    for labels in (Y, jnp.zeros_like(Y)):
        likelihood = lambda logits, labels=labels: cross_entropy(logits, labels)
        product = lambda p, v, f=likelihood: streams.fisher_vector_products(model, f, p, v)
        found = jax.jit(product)(params, tree)
        np.testing.assert_allclose(flatten(found), v @ fisher, atol=1e-10)


def test_sensitivities(problem):
    params, flat, unravel = problem
    v, tree = directions(unravel, flat)
    jacobian = jax.jacobian(lambda p: MODEL.apply(unravel(p), X))(flat)
    found = streams.sensitivities(lambda p: MODEL.apply(p, X), params, tree)
    np.testing.assert_allclose(found, np.einsum("nad,kd->kna", jacobian, v), atol=1e-10)
    inputs = jnp.asarray(np.random.default_rng(2).normal(size=(2, *X.shape)))
    along = streams.sensitivities(lambda x: MODEL.apply(params, x), X, inputs)
    jacobian = jax.jacobian(lambda x: MODEL.apply(params, x))(X)
    np.testing.assert_allclose(along, np.einsum("nabc,kbc->kna", jacobian, inputs), atol=1e-10)


def test_activations_of_linen(problem):
    params, *_ = problem
    p = params["params"]
    hidden = X @ p["layers_0"]["kernel"] + p["layers_0"]["bias"]
    found = streams.activations(MODEL, X, params)
    assert set(found) == {"", "layers_0", "layers_2"}
    np.testing.assert_allclose(found["layers_0"], hidden, atol=1e-12)
    np.testing.assert_allclose(found[""], MODEL.apply(params, X), atol=1e-12)
    only = jax.jit(lambda p: streams.activations(MODEL, X, p, lambda path: path.endswith("2")))(
        params
    )
    np.testing.assert_allclose(only["layers_2"], found[""], atol=1e-12)
    with pytest.raises(ValueError, match="path"):
        streams.activations(MODEL, X, params, lambda path: False)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(5)
        return layer(layer(x))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 4, rngs=rngs)
        self.second = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def test_a_module_called_twice_has_two_outputs(x64):
    variables = Shared().init(jax.random.key(0), X)
    found = streams.activations(Shared(), X, variables, lambda path: path != "")
    assert set(found) == {"Dense_0:0", "Dense_0:1"}
    np.testing.assert_allclose(found["Dense_0:1"], Shared().apply(variables, X), atol=1e-12)


def test_activations_of_nnx():
    model = Net(nnx.Rngs(0))
    x = jnp.asarray(X, jnp.float32)
    found = streams.activations(model, x)
    assert set(found) == {"", "first", "second"}
    np.testing.assert_allclose(found["first"], model.first(x), atol=1e-6)
    np.testing.assert_allclose(found["second"], model(x), atol=1e-6)
    assert set(streams.activations(model, x, where=lambda p: p == "first")) == {"first"}


def test_streams_of_an_nnx_model_feed_a_tracker():
    model = Net(nnx.Rngs(0))
    graph, state = nnx.split(model)
    x = jnp.asarray(X, jnp.float32)
    mean = lambda state, batch: cross_entropy(nnx.merge(graph, state)(batch[0]), batch[1])
    vectors = jax.jit(lambda s: streams.gradients(mean, s, (x, Y), parts=6))(state)
    tracker = lro.online.trackers.CCIPCA(2)  # which draws nothing
    follow = lambda example, v: tracker.update(tracker.init(jax.random.key(0), example), v)
    op = tracker.operator(jax.jit(follow)(state, vectors))
    top = jax.tree.map(lambda v: v[0], op.eigenvectors())
    assert jax.tree.structure(op(top)) == jax.tree.structure(state)
    flat = jnp.asarray(flatten(vectors))
    alone = tracker.operator(jax.jit(follow)(flat[0], flat))
    np.testing.assert_allclose(op.eigenvalues(), alone.eigenvalues(), rtol=1e-5)
    np.testing.assert_allclose(
        np.abs(np.sum(flatten(op.eigenvectors()) * alone.eigenvectors(), axis=1)), 1, atol=1e-5
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: streams.gradients(loss, {}, (X, Y), parts=4),
        lambda: streams.gradients(loss, {}, (X, Y), parts=0),
        lambda: streams.per_example_gradients(loss, {}, (X, Y[:3])),
        lambda: streams.per_example_gradients(loss, {}, (X, jnp.zeros(()))),
        lambda: streams.hessian_vector_products(jnp.sum, X, X),
        lambda: streams.sensitivities(jnp.sum, X, {"a": X[None]}),
        lambda: streams.fisher_vector_products(jnp.sum, jnp.sum, X, jnp.ones((2, 3))),
    ],
)
def test_nonsense_is_refused(call):
    with pytest.raises(ValueError, match="pass"):
        call()
