"""The compiled parts of a fit: its first state, its steps, and its evaluations.

They are compiled once for all fits that are alike but for their numbers: arrays of the operator
are arguments, everything else is told apart by `identity`.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.experimental.shard_alike import shard_alike

from lowrank_optax._core.checks import check
from lowrank_optax._core.devices import everywhere, mesh_of, split_over_devices
from lowrank_optax._core.linalg import safe_divide
from lowrank_optax.spectral._fingerprint import identity
from lowrank_optax.spectral.decomposition import functions_of, initialize
from lowrank_optax.spectral.methods import Method, moments, surrogate
from lowrank_optax.spectral.methods._moments import whitening
from lowrank_optax.spectral.operators import SampledOperator


class Gauge(NamedTuple):
    """Running Rayleigh quotients, by which images are shifted and divided.

    Attributes:
      low: the smallest quotient of an output, in units of the operator.
      high: the largest.
    """

    low: jax.Array
    high: jax.Array


class FitState(NamedTuple):
    """All that a step reads and writes.

    Attributes:
      step: number of batches drawn.
      params: the parameters, a tree for every side.
      average: the parameters' exponential moving average.
      optimizer: the optimizer's state.
      memory: the method's memory.
      sampler: the operator's state.
      faults: number of steps in a row that were not finite and changed nothing.
      gauge: the `Gauge` of the images.
      best: the average of the best evaluation on what was held out.
    """

    step: jax.Array
    params: Any
    average: Any
    optimizer: Any
    memory: Any
    sampler: Any
    faults: jax.Array
    gauge: Gauge
    best: Any


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a fit is compiled for; two are equal where the compiled functions would be.

    Attributes:
      key: what tells them apart.
      kind: the operator's class, or the operator itself where it has other attributes than fields.
      fixed: the operator's fields that hold no arrays.
      networks: a network for every side.
      method: the method.
      optimizer: the optimizer.
      ema: decay of the average of the parameters.
      batch_size: number of points in a batch.
    """

    key: Any
    kind: Any = dataclasses.field(compare=False)
    fixed: dict[str, Any] = dataclasses.field(compare=False)
    networks: tuple[Any, ...] = dataclasses.field(compare=False)
    method: Method = dataclasses.field(compare=False)
    optimizer: optax.GradientTransformation = dataclasses.field(compare=False)
    ema: float = dataclasses.field(compare=False)
    batch_size: int = dataclasses.field(compare=False)

    @classmethod
    def of(cls, operator: SampledOperator, *rest: Any) -> tuple["Parts", dict[str, Any]]:
        """The parts, and the operator's arrays."""
        arrays, kind, fixed = {}, type(operator), vars(operator)
        if {f.name for f in dataclasses.fields(operator)} == fixed.keys():
            arrays = {name: x for name, x in fixed.items() if _only_arrays(x)}
            fixed = {name: x for name, x in fixed.items() if name not in arrays}
        else:
            kind, fixed = operator, {}
        return cls(identity((kind, fixed, *rest)), kind, fixed, *rest), arrays

    def operator(self, arrays: dict[str, Any]) -> SampledOperator:
        """The operator with other arrays of the same shapes."""
        if isinstance(self.kind, SampledOperator):
            return self.kind
        made = object.__new__(self.kind)
        for name, value in (self.fixed | arrays).items():
            object.__setattr__(made, name, value)
        return made


def _only_arrays(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(x, jax.Array) for x in leaves)


@partial(jax.jit, static_argnames="parts")
def start(parts: Parts, arrays: dict[str, Any], key: jax.Array) -> FitState:
    """The state before the first step."""
    operator, networks = parts.operator(arrays), parts.networks
    batch = operator.sample(key, parts.batch_size, operator.init())
    mesh, params = mesh_of(batch), initialize(operator, networks, key)
    _check_outputs(operator, networks, params, batch)
    apply = lambda p: operator.apply(*functions_of(networks, p), batch)
    outputs: Any = jax.eval_shape(apply, params)
    check(
        len({out.shape[-1] for out in outputs}) == 1 and all(out.ndim == 2 for out in outputs),
        f"fit: the operator gives outputs of shapes {[out.shape for out in outputs]}; pass "
        "networks that map one point to (L,), with one L.",
    )
    large = lambda tree: split_over_devices(tree, mesh)
    state = FitState(
        step=jnp.zeros((), jnp.int32),
        params=large(params),
        average=large(params),
        optimizer=large(parts.optimizer.init(params)),
        memory=parts.method.init(outputs[0].shape[-1]),
        sampler=operator.init(),
        faults=jnp.zeros((), jnp.int32),
        gauge=Gauge(jnp.zeros(()), jnp.zeros(())),
        best=large(params),
    )
    # Weak types change after the first step, so that everything would be compiled twice.
    return jax.tree.map(
        lambda x: x if is_key(x) else lax.convert_element_type(x, jnp.result_type(x)), state
    )


def _check_outputs(operator: SampledOperator, networks: Any, params: Any, batch: Any) -> None:
    for network, own, points in zip(networks, params, operator.points(batch), strict=True):
        point = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), points)
        out: Any = jax.eval_shape(network.apply, own, point)
        check(
            getattr(out, "ndim", 2) <= 1,
            f"fit: the network maps one point to an output of shape {getattr(out, 'shape', out)}; "
            "pass one that gives (L,), a number for each mode.",
        )


@partial(jax.jit, static_argnames="parts")
def advance(
    parts: Parts, arrays: dict[str, Any], key: jax.Array, state: FitState, steps: jax.Array
) -> FitState:
    """The state after so many steps."""
    operator = parts.operator(arrays)
    return lax.fori_loop(0, steps, lambda _, s: _step(parts, operator, key, s), state)


def _step(parts: Parts, operator: SampledOperator, key: jax.Array, state: FitState) -> FitState:
    batch = operator.sample(jax.random.fold_in(key, state.step), parts.batch_size, state.sampler)
    mesh = mesh_of(batch)
    batch = split_over_devices(batch, mesh, (0,))

    def loss(params) -> tuple[jax.Array, Any]:
        pairs = _pairs(operator.apply(*functions_of(parts.networks, params), batch))
        gauge = _followed(state.gauge, pairs, state.step)
        out: Any = surrogate(parts.method, _gauged(pairs, gauge), state.memory)
        return out[0], (out[1], pairs, gauge)

    grads, aux = jax.grad(loss, has_aux=True)(state.params)
    memory, pairs, gauge = aux
    updates, opt = parts.optimizer.update(grads, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    # A young average would remember the start for 1/(1 - ema) steps.
    decay = _young(parts.ema, state.step)
    average = jax.tree.map(
        lambda a, p: (decay * a + (1 - decay) * p).astype(p.dtype), state.average, params
    )
    new = FitState(
        state.step,
        params,
        average,
        opt,
        memory,
        operator.adapt(state.sampler, batch, pairs[0][0]),
        jnp.zeros_like(state.faults),
        gauge,
        state.best,
    )
    ok = finite((pairs, grads, params, memory, gauge))
    kept = state._replace(faults=state.faults + 1)
    new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, kept)
    new = new._replace(step=state.step + 1)
    return new if mesh is None else shard_alike(new, state)[0]


def _young(decay: float, step: jax.Array) -> jax.Array:
    return jnp.minimum(decay, (1 + step) / (10 + step))


def _pairs(outputs: tuple[jax.Array, ...]):
    """Pairs without a gradient through the images, whose half is in the cotangents."""
    return tuple(
        (f, lax.stop_gradient(tf)) for f, tf in zip(outputs[::2], outputs[1::2], strict=True)
    )


def _followed(gauge: Gauge, pairs: Any, step: jax.Array) -> Gauge:
    """The running quotients after a batch."""
    values = _values(lax.stop_gradient(pairs))
    decay = _young(0.98, step)
    mixed = lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype)
    return Gauge(mixed(gauge.low, jnp.min(values)), mixed(gauge.high, jnp.max(values)))


def _values(pairs: Any) -> jax.Array:
    """Rayleigh quotients, with one side of what each output adds to earlier ones.

    An output that has shrunk within the span of the others would show their eigenvalues.
    """
    (f, tf), other = pairs[0], pairs[-1][0]
    norm = lambda a: jnp.sqrt(jnp.sum(a * a, 0))
    if len(pairs) == 2:
        return safe_divide(jnp.abs(jnp.sum(f * tf, 0)), norm(f) * norm(other))
    size = safe_divide(1.0, norm(f))
    f, tf = f * size[None], tf * size[None]
    whiten = whitening(f.T @ f + jnp.diag(jnp.where(size > 0, 0.0, 1.0).astype(f.dtype)))
    return jnp.sum(whiten * ((f.T @ tf) @ whiten), 0)


def shift_and_unit(gauge: Gauge) -> tuple[jax.Array, jax.Array]:
    """What images are shifted by, and then divided by.

    Where the largest eigenvalue is clearly above zero, the operator's own zero stays. Elsewhere the
    smallest one that is sought is moved above zero, by a margin in units of the eigenvalues.
    """
    spread = gauge.high - gauge.low
    margin = jnp.maximum(spread, jnp.abs(gauge.high)) / 4
    shift = jnp.where(gauge.high > 0.05 * spread, 0.0, margin - gauge.low)
    unit = gauge.high + shift
    return shift, jnp.where(unit > 0, unit, 1.0)


def _gauged(pairs: Any, gauge: Gauge) -> Any:
    shift, unit = shift_and_unit(gauge)
    shift = shift if len(pairs) == 1 else 0.0
    return tuple((f, ((tf + shift * f) / unit).astype(tf.dtype)) for f, tf in pairs)


@partial(jax.jit, static_argnames=("parts", "count"))
def evaluate(
    parts: Parts, arrays: dict[str, Any], key: jax.Array, state: FitState, count: int, given: Any
) -> Any:
    """`SideMoments` of the averaged functions, batch by batch.

    The batches are ``given``, or ``count`` fresh ones, on the same keys every time, for ``None``.
    """
    operator = parts.operator(arrays)
    functions = functions_of(parts.networks, state.average)

    def one(batch: Any) -> Any:
        batch = split_over_devices(batch, mesh_of(batch), (0,))
        return moments(_pairs(operator.apply(*functions, batch)))

    if given is not None:
        return lax.map(one, given)
    draw = lambda i: operator.sample(jax.random.fold_in(key, i), parts.batch_size, state.sampler)
    return lax.map(lambda i: one(draw(i)), jnp.arange(count))


@jax.jit
def gather(tree: Any) -> Any:
    """Arrays whole on every device."""
    return everywhere(tree, mesh_of(tree))


def finite(tree: Any) -> jax.Array:
    """Whether all numbers of a tree are finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def is_key(x: Any) -> bool:
    """Whether an array holds keys of random numbers."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
