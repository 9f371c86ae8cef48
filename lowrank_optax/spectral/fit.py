"""Trains a network until its outputs are the eigen- or singular functions of an operator."""

import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax._core.checks import check, check_count, check_decay
from lowrank_optax.spectral import _reading as reading
from lowrank_optax.spectral import _training as training
from lowrank_optax.spectral._choices import Plan, plan
from lowrank_optax.spectral._fingerprint import fingerprint
from lowrank_optax.spectral._progress import watching
from lowrank_optax.spectral._training import FitState
from lowrank_optax.spectral.decomposition import Decomposition
from lowrank_optax.spectral.methods import Method
from lowrank_optax.spectral.operators import SampledOperator

FAULTS = 10
"""Steps in a row that gave something not finite, after which a fit is over."""

GROWTH = 1e6
"""By how much the largest ``‖f‖²`` may exceed its start before a fit is called diverging."""

STILL = 1e-4
"""The part of an eigenvalue that counts as standing still, whatever its error."""

WORSE = 0.02
"""The part of the best score on what was held out by which a lower one is worse."""

PATIENCE = 3
"""Evaluations in a row that are worse than the best one, after which a fit is over."""


def fit(
    operator: SampledOperator,
    network: Any,
    *,
    method: Method | None = None,
    optimizer: optax.GradientTransformation | None = None,
    steps: int | None = None,
    batch_size: int = 512,
    seed: int = 0,
    ema: float = 0.99,
    evaluate_every: int | None = None,
    evaluate_batches: int = 64,
    progress: Callable[[dict[str, Any]], Any] | bool | None = None,
    checkpoint: str | None = None,
    patience: int | None = None,
) -> Decomposition:
    """Learns the modes of largest eigenvalue (singular value) of an operator.

    An operator made from data learns from a part of them and is read from the rest (its argument
    ``held_out_part``); the fit ends when the score on the rest falls, and gives back the best.

    Images are shifted and divided by running Rayleigh quotients before a method sees them, so that
    the largest eigenvalue is about 1 in whatever unit, and the smallest above zero where the
    operator has none above. What is read is in units of the operator.

    A step that gives something not finite changes nothing. Ten of them in a row, or an evaluation
    that finds the functions diverging, end the fit with a warning and the last good parameters.

    Args:
      operator: the operator, such as `operators.Matrix` or `operators.Schrodinger`.
      network: a number of modes, for `networks.default`; or a flax module or a pair ``(init(key,
        point), apply(params, point) -> (L,))``; two of them, or one for both, where the operator
        has two sides.
      method: the rule that turns functions and images into a direction, a `Method`. By default
        (``None``) it suits the operator: ``VariationalEnergy(floor=0.01)`` for differential ones,
        with one network for all modes; `NestedLoRA` for others, over all points at once where they
        are indices. The result says which.
      optimizer: any optax transformation; by default Adam with a rate that falls from 3e-3 (3e-2
        for tables of rows) to 0 along a cosine, with whitening (`scale_by_lre`) in front of it
        where the default method is an energy.
      steps: number of batches. By default (``None``) it is found: rounds of 500, 1000, 2000, 4000
        and 8000 steps, each with the rate's own cosine, until no eigenvalue changes by more than
        its sampling error, or 1e-4 of it, in a round.
      batch_size: number of points in a batch, 512 by default.
      seed: seed of parameters and batches, 0 by default; the same seed gives the same result.
      ema: decay of the average of the parameters that is evaluated and returned, in [0, 1), 0.99 by
        default; 0 for none.
      evaluate_every: number of steps between evaluations; by default a tenth of ``steps``, and 250
        where the steps are found.
      evaluate_batches: number of batches of an evaluation, 64 by default, where they are fresh.
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

    Cost: a step is one application of the operator and one gradient of the network. Memory is four
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
    if evaluate_every is None:
        evaluate_every = 250 if steps is None else max(1, int(steps) // 10)
    counts = {"batch_size": batch_size, "evaluate_batches": evaluate_batches}
    counts |= {"evaluate_every": evaluate_every}
    counts |= {} if patience is None else {"patience": patience}
    for name, value in counts.items():
        check_count("fit", name, value)
    check_decay("fit", "ema", ema)
    chosen = plan(operator, network, method, optimizer, steps)
    programs = _programs(chosen, ema, batch_size, evaluate_batches, seed)
    state, history, identity = programs.state, [], ""
    if checkpoint is not None:
        parts = (chosen.operator, chosen.networks, chosen.optimizer)
        told = " ".join(fingerprint(part) for part in parts)
        numbers = f"{steps=} {batch_size=} {seed=} {ema=} {evaluate_every=}"
        identity = f"{chosen.method!r} {told} {numbers}"
        if os.path.exists(checkpoint):
            state, history = _restore(checkpoint, state, identity)
    run = _Run(chosen, programs, evaluate_every, patience, checkpoint, identity)
    with watching(progress, chosen.rounds[-1]) as show:
        found = run(state, history, show.record)
        show.result(found)
    return found


class _Programs(NamedTuple):
    """The first state of a fit, and its compiled functions.

    Attributes:
      state: the state before the first step.
      advance: ``(state, steps) ->`` the state after so many steps.
      read: the `Decomposition` of a state, by an evaluation.
      efficiency: the sampler's effective sample size in a state.
    """

    state: FitState
    advance: Callable[[FitState, int], FitState]
    read: Callable[[FitState], Decomposition]
    efficiency: Callable[[FitState], float]


def _programs(chosen: Plan, ema, batch_size, count, seed) -> _Programs:
    """The compiled functions on the data to learn from, and readings on those held out."""
    learned, batches = chosen.operator.held_out()
    rest = (chosen.networks, chosen.method, chosen.optimizer, ema, int(batch_size))
    parts, arrays = training.Parts.of(learned, *rest)
    first, steps, evaluation = jax.random.split(jax.random.key(seed), 3)
    try:
        state = training.start(parts, arrays, first)
        jax.eval_shape(lambda s: training.advance(parts, arrays, steps, s, jnp.array(1)), state)
    except TypeError as error:
        check(
            "value" not in str(error), f"fit: the optimizer asks for more than gradients: {error}"
        )
        raise
    split = batches is not None and learned is not chosen.operator

    def read(state: FitState) -> Decomposition:
        measure = lambda given: training.evaluate(parts, arrays, evaluation, state, count, given)
        shift = float(training.shift_and_unit(state.gauge)[0]) if learned.sides == 1 else 0.0
        least = -shift if chosen.method.positive else -np.inf
        return Decomposition.of(
            chosen.operator,
            chosen.networks,
            training.gather(state.average),
            measure(batches),
            measure(None) if split else None,
            step=int(state.step),
            method=repr(chosen.method),
            least=max(least, chosen.operator.least),
        )

    advance = lambda state, n: training.advance(parts, arrays, steps, state, jnp.array(n))
    return _Programs(state, advance, read, lambda s: float(learned.efficiency(s.sampler)))


@dataclasses.dataclass(frozen=True)
class _Run:
    """The loop of a fit, and when it ends."""

    chosen: Plan
    programs: _Programs
    every: int
    patience: int | None
    checkpoint: str | None
    identity: str

    def __call__(self, state: FitState, history: list[Any], show: Any) -> Decomposition:
        start, begin = time.perf_counter(), history[-1]["seconds"] if history else 0.0
        steps = self.chosen.rounds[-1]
        found = self.programs.read(state)
        bound = _bound(history[0]["norm"] if history else _norm(found))
        top = max((record["score"] for record in history), default=-np.inf)
        message = self._reason(history, found) if history else ""
        while not message and int(state.step) < steps:
            ahead = (self.every * (int(state.step) // self.every + 1), *self.chosen.rounds)
            goal = min(s for s in ahead if s > int(state.step))
            state = self.programs.advance(state, goal - int(state.step))
            latest = self.programs.read(state)
            fault = _fault(int(state.faults), _norm(latest), bound)
            found = found if fault and not _norm(latest) <= bound else latest
            if fault:
                message = f"stopped at step {int(state.step)}: {fault}; these are the parameters "
                message += f"of step {found.step}."
                warnings.warn(message, RuntimeWarning, stacklevel=3)
                break
            seconds = begin + time.perf_counter() - start
            history.append(_record(found, seconds, self.programs.efficiency(state)))
            if found.seen is not None and history[-1]["score"] > top:
                top, state = history[-1]["score"], state._replace(best=state.average)
            if self.checkpoint is not None:
                _save(self.checkpoint, training.gather(state), history, self.identity)
            show(history[-1])
            message = self._reason(history, found)
        message = message or "finished"
        steps = [r["step"] for r in history if r["score"] == top and r["step"] < found.step]
        if found.seen is not None and steps:
            found = self.programs.read(state._replace(average=state.best, step=np.array(steps[0])))
            message += f"; step {found.step} scored best on what was held out"
        return dataclasses.replace(found, message=message, history=tuple(history))

    def _reason(self, history: list[dict[str, Any]], found: Decomposition) -> str:
        """Why to stop here, or nothing."""
        if self.patience is not None and _stalled(history, self.patience):
            return f"no better for {self.patience} evaluations"
        scores = [record["score"] for record in history]
        worse = max(scores) - WORSE * abs(max(scores))
        if found.seen is not None and max([-np.inf, *scores[-PATIENCE:]]) < worse:
            return "the score on what was held out falls"
        rounds = self.chosen.rounds
        if found.step in rounds[1:] and rounds.index(found.step) < len(rounds):
            before = rounds[rounds.index(found.step) - 1]
            old = [r["eigenvalues"] for r in history if r["step"] == before]
            if old and _still(np.array(old[0]), found):
                return f"no eigenvalue has changed beyond its error since step {before}"
        return ""


def _still(old: np.ndarray, found: Decomposition) -> bool:
    values = found.eigenvalues
    size = np.maximum(np.abs(values), reading.LEAST * np.abs(values).max())
    allowed = np.maximum(np.nan_to_num(found.sampling_errors), STILL * size)
    return bool(np.all(np.abs(values - old) <= allowed))


def _record(found: Decomposition, seconds: float, efficiency: float) -> dict[str, Any]:
    """What the history keeps of an evaluation."""
    return {
        "step": found.step,
        "seconds": seconds,
        "eigenvalues": found.eigenvalues.tolist(),
        "raw": found.raw().eigenvalues.tolist(),
        "score": found.score,
        "norm": _norm(found),
        "efficiency": efficiency,
    }


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
    scores = [record["score"] for record in history]
    if len(scores) <= patience:
        return False
    before = max(scores[:-patience])
    return max(scores[-patience:]) <= before + 1e-4 * abs(before)


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
        if training.is_key(old)
        else jnp.asarray(x.view(old.dtype))
        for x, old in zip(saved, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, back), about["history"]


def _plain(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if training.is_key(x) else x)
