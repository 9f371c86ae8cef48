"""Trains a network until its outputs are the eigen- or singular functions of an operator."""

import dataclasses
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
from lowrank_optax.spectral._progress import watching
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
from lowrank_optax.spectral.operators import SampledOperator
from lowrank_optax.spectral.operators.differential import Differential

FAULTS = 10
"""Steps in a row that gave something not finite, after which a fit is over."""

GROWTH = 1e6
"""By how much the largest ``‖f‖²`` may exceed its start before a fit is called diverging."""


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
    """

    step: jax.Array
    params: Any
    average: Any
    optimizer: Any
    memory: Any
    sampler: Any
    faults: jax.Array


def fit(
    operator: SampledOperator,
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
    progress: Callable[[dict[str, Any]], Any] | bool | None = None,
    checkpoint: str | None = None,
    patience: int | None = None,
) -> Decomposition:
    """Learns the modes of largest eigenvalue (singular value) of an operator.

    A step that gives something not finite changes nothing. Ten of them in a row, or an evaluation
    that finds the functions diverging, end the fit with a warning and the last good parameters.

    Args:
      operator: the operator, such as `operators.Matrix` or `operators.Schrodinger`.
      network: a number of modes, for `networks.default`; or a flax module or a pair ``(init(key,
        point), apply(params, point) -> (L,))``; two of them, or one for both, where the operator
        has two sides.
      method: the rule that turns functions and images into a direction, a `Method`, by default
        `NestedLoRA`.
      optimizer: any optax transformation; by default Adam with a rate that falls from 3e-3 to 0
        along a cosine over ``steps``.
      steps: number of batches, 2000 by default.
      batch_size: number of points in a batch, 512 by default.
      seed: seed of parameters and batches, 0 by default; the same seed gives the same result.
      ema: decay of the average of the parameters that is evaluated and returned, in [0, 1), 0.99 by
        default; 0 for none.
      evaluate_every: number of steps between evaluations; a tenth of ``steps`` by default.
      evaluate_batches: number of batches of an evaluation, 16 by default.
      progress: function that is called with the record of every evaluation, such as `print`. By
        default (``None``) a bar and, at the end, a table of the modes on a terminal where rich is
        installed, and nothing elsewhere; ``False`` for nothing, ``True`` for both at any rate.
      checkpoint: path of an ``.npz`` that is written at every evaluation. Where it exists, the fit
        goes on from there, as if it had never stopped. A fit is recognised by the numbers and data
        within operator, networks and optimizer, and by the names of functions, not by their code.
      patience: number of evaluations without a better sum of eigenvalues after which the fit stops;
        ``None``, the default, never stops it.

    Returns:
      A `Decomposition`.

    Several devices: where there is a current mesh (`jax.set_mesh`) with automatic axes, or the
    operator's data lie on one, batches are split over its devices, and parameters and optimizer's
    state along their longest axes.

    Raises:
      ValueError: for arguments out of range, parts or outputs that do not fit each other, or the
        checkpoint of another fit.

    Cost: a step is one application of the operator and one gradient of the network. Memory is three
    copies of the parameters beside the optimizer's state.

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

    Source: Ryu et al., "Operator SVD with Neural Networks via Nested Low-Rank Approximation", ICML
    2024.
    """
    every = max(1, steps // 10) if evaluate_every is None else evaluate_every
    counts = {"steps": steps, "batch_size": batch_size, "evaluate_batches": evaluate_batches}
    counts |= {"evaluate_every": every} | ({} if patience is None else {"patience": patience})
    for name, value in counts.items():
        check_count("fit", name, value)
    check_decay("fit", "ema", ema)
    if optimizer is None:
        optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    networks = _networks(operator, network)
    _check_match(operator, networks, method)
    programs = _programs(
        operator, networks, method, optimizer, ema, batch_size, evaluate_batches, seed
    )
    state, history, identity = programs.state, [], ""
    if checkpoint is not None:
        parts = " ".join(fingerprint(part) for part in (operator, networks, optimizer))
        numbers = f"steps={steps} batch={batch_size} seed={seed} ema={ema} {every=}"
        identity = f"{method!r} {parts} {numbers}"
        if os.path.exists(checkpoint):
            state, history = _restore(checkpoint, state, identity)
    start, begin = time.perf_counter(), history[-1]["seconds"] if history else 0.0
    found = programs.read(state)
    bound = _bound(history[0]["norm"] if history else _norm(found))
    message = "finished"
    with watching(progress, steps) as show:
        while int(state.step) < steps:
            length = min(every - int(state.step) % every, steps - int(state.step))
            state = programs.advance(state, length)
            latest = programs.read(state)
            fault = _fault(int(state.faults), _norm(latest), bound)
            found = found if fault and not _norm(latest) <= bound else latest
            if fault:
                message = (
                    f"stopped at step {int(state.step)}: {fault}; these are the parameters of "
                )
                message += f"step {found.step}."
                warnings.warn(message, RuntimeWarning, stacklevel=2)
                break
            history.append(_record(operator, state, found, begin + time.perf_counter() - start))
            if checkpoint is not None:
                _save(checkpoint, programs.gather(state), history, identity)
            show.record(history[-1])
            if patience is not None and _stalled(history, patience):
                message = f"no better for {patience} evaluations"
                break
        found = dataclasses.replace(found, message=message, history=tuple(history))
        show.result(found)
    return found


def _networks(operator: SampledOperator, network: Any) -> tuple[Any, ...]:
    """A network for every side; a number of modes stands for the default."""
    if isinstance(network, int):
        from lowrank_optax.spectral import networks as modules  # extra: flax

        network = modules.default(operator, network)
    return networks_of(network, operator.sides)


def _check_match(operator: SampledOperator, networks: tuple[Any, ...], method: Method) -> None:
    """Refuses parts that would give a wrong result together, and meshes that fail."""
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
    kinked = any(getattr(getattr(n, "features", None), "kink", False) for n in networks)
    check(
        not (kinked and isinstance(operator, Differential) and operator.dimension == 1),
        "fit: the network's features have a kink and the operator is of second order on a line, "
        "where the kink's second derivative is a point mass that no sample sees; pass kink=False.",
    )
    kinds = jax.sharding.get_abstract_mesh().axis_types
    check(
        jax.sharding.AxisType.Explicit not in kinds,
        f"fit: the current mesh has axes of the types {kinds}; make one with "
        "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto, ...)).",
    )


class _Programs(NamedTuple):
    """The first state of a fit, and its compiled functions.

    Attributes:
      state: the state before the first step.
      advance: ``(state, steps) ->`` the state after so many steps.
      read: the `Decomposition` of a state, by an evaluation.
      gather: a state whose arrays lie whole on every device.
    """

    state: FitState
    advance: Callable[[FitState, int], FitState]
    read: Callable[[FitState], Decomposition]
    gather: Callable[[Any], Any]


def _programs(operator, networks, method, optimizer, ema, batch_size, batches, seed) -> _Programs:
    first, training, evaluation = jax.random.split(jax.random.key(seed), 3)
    state = jax.jit(partial(_start, operator, networks, method, optimizer, batch_size))(first)
    advance = jax.jit(
        partial(_advance, operator, networks, method, optimizer, ema, batch_size, training),
        static_argnums=1,
    )
    evaluate = jax.jit(partial(_evaluate, operator, networks, batch_size, batches, evaluation))
    gather = jax.jit(lambda tree: everywhere(tree, mesh_of(tree)))
    read = lambda state: Decomposition.of(
        operator, networks, gather(state.average), evaluate(state), step=int(state.step)
    )
    return _Programs(state, advance, read, gather)


def _record(operator, state: FitState, found: Decomposition, seconds: float) -> dict[str, Any]:
    """What the history keeps of an evaluation."""
    return {
        "step": int(state.step),
        "seconds": seconds,
        "eigenvalues": found.eigenvalues.tolist(),
        "raw": found.raw().eigenvalues.tolist(),
        "norm": _norm(found),
        "efficiency": float(operator.efficiency(state.sampler)),
    }


def _start(operator: SampledOperator, networks, method, optimizer, batch_size, key) -> FitState:
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
    # Weak types change after the first step, so that everything would be compiled twice.
    return jax.tree.map(
        lambda x: x if _is_key(x) else lax.convert_element_type(x, jnp.result_type(x)), state
    )


def _pairs(outputs: tuple[jax.Array, ...]):
    """Pairs without a gradient through the images, whose half is in the cotangents."""
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
    """`SideMoments` of the averaged functions on the same keys every time, batch by batch."""
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


def _bound(start: float) -> float:
    """The largest ``‖f‖²`` of a fit that does not diverge, from the one it began with."""
    return GROWTH * max(1.0, start if np.isfinite(start) else 1.0)


def _fault(faults: int, norm: float, bound: float) -> str:
    if not np.isfinite(norm):
        return "the evaluation gave values that are not finite"
    if norm > bound:
        return f"the functions diverge (largest squared norm {norm:.3g})"
    if faults >= FAULTS:
        return f"the last {faults} steps gave values that are not finite"
    return ""


def _stalled(history: list[dict[str, Any]], patience: int) -> bool:
    sums = [sum(record["eigenvalues"]) for record in history]
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
