"""Trains a network until its outputs are the eigen- or singular functions of an operator."""

import json
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental.shard_alike import shard_alike

from lowrank_optax._core.checks import check, check_count, check_decay
from lowrank_optax._core.devices import everywhere, mesh_of, split_over_devices
from lowrank_optax.spectral._fingerprint import fingerprint
from lowrank_optax.spectral.decomposition import (
    Decomposition,
    functions_of,
    initialize,
    networks_of,
)
from lowrank_optax.spectral.methods import (
    Method,
    NestedLoRA,
    UStatistic,
    WholeBatch,
    moments,
    surrogate,
)
from lowrank_optax.spectral.operators import Operator
from lowrank_optax.spectral.operators.differential import Differential

FAULTS = 10
"""Steps in a row that gave something not finite, after which a fit is over."""

GROWTH = 1e6
"""By how much the largest ``‖f‖²`` may exceed its start before a fit is called diverging."""


class FitState(NamedTuple):
    """All that a step reads and writes.

    Attributes:
      step: batches drawn.
      params: a tree for every side.
      average: their exponential moving average.
      optimizer: the optimizer's state.
      memory: the method's.
      sampler: the operator's.
      faults: steps in a row that were not finite and changed nothing.
    """

    step: jax.Array
    params: Any
    average: Any
    optimizer: Any
    memory: Any
    sampler: Any
    faults: jax.Array


def fit(
    operator: Operator,
    network: Any,
    *,
    method: Method = NestedLoRA(),
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 2000,
    batch_size: int = 512,
    seed: int = 0,
    ema: float = 0.99,
    evaluate_every: int | None = None,
    evaluate_batches: int = 16,
    progress: Callable[[dict[str, Any]], Any] | None = None,
    checkpoint: str | None = None,
    patience: int | None = None,
) -> Decomposition:
    """Learns the modes of largest eigenvalue (singular value) of an operator.

    A step that gives something not finite changes nothing. Ten of them in a row, or an evaluation
    that finds the functions diverging, end the fit with a warning and the last good parameters.

    Args:
      operator: an `Operator`.
      network: a number of modes, for `networks.default`; or a flax module or a pair
        ``(init(key, point), apply(params, point) -> (L,))``; two of them, or one for both, where
        the operator has two sides.
      method: a `Method`.
      optimizer: any optax transformation; by default Adam with a rate that falls from 3e-3 to 0
        along a cosine over ``steps``.
      steps: batches.
      batch_size: points a batch.
      seed: of parameters and batches; the same seed gives the same result.
      ema: decay of the average of the parameters that is evaluated and returned; 0 for none.
      evaluate_every: steps between evaluations; a tenth of ``steps`` by default.
      evaluate_batches: batches of an evaluation.
      progress: called with the record of every evaluation, such as `print`.
      checkpoint: an ``.npz`` that is written at every evaluation; where it exists, the fit goes on
        from there, as if it had never stopped. Its fit is told by the numbers and data within
        operator, networks and optimizer, and by the names of functions, not by their code.
      patience: evaluations without a better sum of eigenvalues after which to stop.

    Returns:
      A `Decomposition`.

    Several devices: where there is a current mesh (`jax.set_mesh`) with automatic axes, or the
    operator's data lie on one, batches are split over its devices, and parameters and optimizer's
    state along their longest axes.

    Raises:
      ValueError: for arguments out of range, outputs that do not fit, or another fit's checkpoint.

    Cost: a step is one application of the operator and one gradient of the network.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from lowrank_optax import spectral
      >>> diagonal = jnp.diag(jnp.array([4.0, 2.0, 1.0]))
      >>> operator = spectral.operators.Matrix(diagonal, everything=True)
      >>> table = (lambda key, i: jnp.eye(3, 2) + 0.1, lambda rows, i: rows[i])
      >>> method = spectral.NestedLoRA(moments=spectral.WholeBatch())
      >>> adam = optax.adam(0.03)
      >>> found = spectral.fit(operator, table, method=method, optimizer=adam, steps=300)
      >>> print(found.eigenvalues.round(3))
      [4. 2.]
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        check_count("fit", name, value)
    check_count("fit", "evaluate_batches", evaluate_batches)
    check_decay("fit", "ema", ema)
    every = max(1, steps // 10) if evaluate_every is None else evaluate_every
    check_count("fit", "evaluate_every", every)
    if patience is not None:
        check_count("fit", "patience", patience)
    estimate = getattr(method, "moments", WholeBatch())
    check(
        not getattr(operator, "everything", False) or isinstance(estimate, WholeBatch),
        f"fit: the operator's batches are everything it has, in order, and {method!r} estimates "
        "moments from parts of them; pass moments=WholeBatch(), or leave out everything=True.",
    )
    check(
        not isinstance(estimate, UStatistic) or estimate.group % operator.group == 0,
        f"fit: {operator.group} rows of a {type(operator).__name__} batch are one sample and "
        f"{estimate!r} would pair them with each other; pass UStatistic({operator.group}).",
    )
    if optimizer is None:
        optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    if isinstance(network, int):
        from lowrank_optax.spectral import networks as modules  # extra: flax

        network = modules.default(operator, network)
    networks = networks_of(network, operator.sides)
    kinked = any(getattr(getattr(n, "features", None), "kink", False) for n in networks)
    check(
        not (kinked and isinstance(operator, Differential) and operator.dimension == 1),
        "fit: the network's features have a kink and the operator is of second order on a line, "
        "where the kink's second derivative is a point mass that no sample sees; pass kink=False.",
    )
    first, training, evaluation = jax.random.split(jax.random.key(seed), 3)
    kinds = jax.sharding.get_abstract_mesh().axis_types
    check(
        jax.sharding.AxisType.Explicit not in kinds,
        f"fit: the current mesh has axes of the types {kinds}; make one with "
        "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto, ...)).",
    )
    state = jax.jit(partial(_start, operator, networks, method, optimizer, batch_size))(first)

    advance = jax.jit(
        partial(_advance, operator, networks, method, optimizer, ema, batch_size, training),
        static_argnums=1,
    )
    evaluate = jax.jit(
        partial(_evaluate, operator, networks, batch_size, evaluate_batches, evaluation)
    )
    whole = jax.jit(lambda tree: everywhere(tree, mesh_of(tree)))
    read = lambda state: Decomposition.of(
        operator, networks, whole(state.average), evaluate(state), step=int(state.step)
    )

    identity, history = "", []
    if checkpoint is not None:
        parts = [fingerprint(part) for part in (operator, networks, optimizer)]
        numbers = f"steps={steps} batch={batch_size} seed={seed} ema={ema} {every=}"
        identity = f"{method!r} {' '.join(parts)} {numbers}"
    if checkpoint is not None and os.path.exists(checkpoint):
        state, history = _restore(checkpoint, state, identity)
    start, begin = time.perf_counter(), history[-1]["seconds"] if history else 0.0

    found = read(state)
    begin_norm = history[0]["norm"] if history else _norm(found)
    bound = GROWTH * max(1.0, begin_norm if np.isfinite(begin_norm) else 1.0)
    message = "finished"
    while int(state.step) < steps:
        state = advance(state, min(every - int(state.step) % every, steps - int(state.step)))
        latest = read(state)
        fault = _fault(int(state.faults), _norm(latest), bound)
        if fault:
            message = f"stopped at step {int(state.step)}: {fault}"
            healthy = _norm(latest) <= bound
            found = latest if healthy else found
            message += f"; these are the parameters of step {found.step}."
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            break
        found = latest
        history.append(
            {
                "step": int(state.step),
                "seconds": begin + time.perf_counter() - start,
                "eigenvalues": found.eigenvalues.tolist(),
                "ritz": found.ritz().eigenvalues.tolist(),
                "norm": _norm(found),
                "efficiency": float(operator.efficiency(state.sampler)),
            }
        )
        if checkpoint is not None:
            _save(checkpoint, whole(state), history, identity)
        if progress is not None:
            progress(history[-1])
        if patience is not None and _stalled(history, patience):
            message = f"no better for {patience} evaluations"
            break
    rest = {"message": message, "history": tuple(history)}
    return Decomposition.of(
        operator, networks, found.params, found.moments, step=found.step, **rest
    )


def _start(operator: Operator, networks, method, optimizer, batch_size, key) -> FitState:
    batch = operator.sample(key, batch_size, operator.init())
    mesh, params = mesh_of(batch), initialize(operator, networks, key)
    apply = lambda p: operator.apply(*functions_of(networks, p), batch)
    outputs: Any = jax.eval_shape(apply, params)
    check(
        len({out.shape[-1] for out in outputs}) == 1 and all(out.ndim == 2 for out in outputs),
        f"fit: the operator gives outputs of shapes {[out.shape for out in outputs]}; pass "
        "networks that map one point to (L,), with one L.",
    )
    state = FitState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        average=params,
        optimizer=optimizer.init(params),
        memory=method.init(outputs[0].shape[-1]),
        sampler=operator.init(),
        faults=jnp.zeros((), jnp.int32),
    )
    large = lambda tree: split_over_devices(tree, mesh)
    state = state._replace(
        params=large(state.params), average=large(state.average), optimizer=large(state.optimizer)
    )
    # Weak types would turn into others after the first step, and everything be compiled twice.
    return jax.tree.map(
        lambda x: x if _is_key(x) else lax.convert_element_type(x, jnp.result_type(x)), state
    )


def _pairs(outputs: tuple[jax.Array, ...]):
    """No gradient through the images: their half of it is in the cotangents."""
    return tuple(
        (f, lax.stop_gradient(tf)) for f, tf in zip(outputs[::2], outputs[1::2], strict=True)
    )


def _advance(operator, networks, method, optimizer, ema, batch_size, key, state, steps):
    def step(state: FitState, _) -> tuple[FitState, None]:
        batch = operator.sample(jax.random.fold_in(key, state.step), batch_size, state.sampler)
        mesh = mesh_of(batch)
        batch = split_over_devices(batch, mesh, (0,))

        def loss(params) -> tuple[jax.Array, Any]:
            pairs = _pairs(operator.apply(*functions_of(networks, params), batch))
            out: Any = surrogate(method, pairs, state.memory)
            return out[0], (out[1], pairs)

        grads, aux = jax.grad(loss, has_aux=True)(state.params)
        memory, pairs = aux
        updates, opt = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # A young average would remember the start for 1/(1 - ema) steps.
        decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
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
        )
        ok = _finite((pairs, grads, params, memory))
        kept = state._replace(faults=state.faults + 1)
        new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, kept)
        new = new._replace(step=state.step + 1)
        return new if mesh is None else shard_alike(new, state)[0], None

    return lax.scan(step, state, length=steps)[0]


def _evaluate(operator, networks, batch_size, batches, key, state):
    """`Moments` of the averaged functions on the same keys every time, batch by batch."""
    functions = functions_of(networks, state.average)

    def one(_, i):
        batch = operator.sample(jax.random.fold_in(key, i), batch_size, state.sampler)
        batch = split_over_devices(batch, mesh_of(batch), (0,))
        return None, moments(_pairs(operator.apply(*functions, batch)))

    return lax.scan(one, None, jnp.arange(batches))[1]


def _finite(tree: Any) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _norm(found: Decomposition) -> float:
    """The largest ``‖f‖²`` of the outputs, infinite where something is not finite."""
    grams = [side.gram.mean(0) for side in found.moments]
    whole = all(np.isfinite(x).all() for side in found.moments for x in side)
    return float(max(np.diagonal(g).max() for g in grams)) if whole else float("inf")


def _fault(faults: int, norm: float, bound: float) -> str:
    if not np.isfinite(norm):
        return "the evaluation gave values that are not finite"
    if norm > bound:
        return f"the functions diverge (largest squared norm {norm:.3g})"
    if faults >= FAULTS:
        return f"the last {faults} steps gave values that are not finite"
    return ""


def _stalled(history: list[dict[str, Any]], patience: int) -> bool:
    sums = [sum(record["ritz"]) for record in history]
    if len(sums) <= patience:
        return False
    before = max(sums[:-patience])
    return max(sums[-patience:]) <= before + 1e-4 * abs(before)


def _save(path: str, state: FitState, history: list[dict[str, Any]], identity: str) -> None:
    leaves = enumerate(jax.tree.leaves(state))
    arrays: dict[str, Any] = {f"leaf_{i}": _plain(x) for i, x in leaves}
    arrays["about"] = np.array(json.dumps({"fit": identity, "history": history}))
    beside = f"{path}.part"
    with open(beside, "wb") as file:
        np.savez(file, **arrays)
    os.replace(beside, path)  # a fit that is killed while writing leaves the older file whole


def _restore(path: str, like: FitState, identity: str) -> tuple[FitState, list[dict[str, Any]]]:
    leaves, tree = jax.tree.flatten(like)
    with np.load(path) as data:
        about = json.loads(str(data["about"]))
        saved = [data[f"leaf_{i}"] for i in range(len(data.files) - 1)]
    same = [x.shape for x in saved] == [_plain(x).shape for x in leaves]
    check(
        same and about.get("fit") == identity,
        f"fit: {path} is the checkpoint of another fit ({about.get('fit')}); this is "
        f"{identity}. Pass another path, or remove the file.",
    )
    back = [
        jax.random.wrap_key_data(x, impl=jax.random.key_impl(old))
        if _is_key(old)
        else jnp.asarray(x.view(old.dtype))
        for x, old in zip(saved, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, back), about["history"]


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if _is_key(x) else x)
