"""What `fit` chooses where nothing is passed, and what it refuses before anything is compiled."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from lowrank_optax import basis, curvature, inner
from lowrank_optax._core.checks import check, check_count
from lowrank_optax.engine.vectors import scale_by_lre
from lowrank_optax.spectral.decomposition import initialize, networks_of
from lowrank_optax.spectral.methods import (
    Method,
    NestedLoRA,
    UStatistic,
    VariationalEnergy,
    WholeBatch,
)
from lowrank_optax.spectral.operators import SampledOperator
from lowrank_optax.spectral.operators.differential import Differential

FIRST = 500
"""Steps of the first round; each of the next has twice as many."""

ROUNDS = 5
"""Rounds after which a fit ends, standing still or not."""

TABLE_RATE, NETWORK_RATE = 3e-2, 3e-3
"""Adam's rate for rows of a table, each of which few batches see, and for a network."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a fit runs with.

    Attributes:
      operator: the operator, with all points in a batch where that was chosen.
      networks: a network for every side.
      method: the method.
      optimizer: the optimizer.
      rounds: numbers of steps at the ends of rounds; the last is the most that are taken.
    """

    operator: SampledOperator
    networks: tuple[Any, ...]
    method: Method
    optimizer: optax.GradientTransformation
    rounds: tuple[int, ...]


def plan(operator: Any, network: Any, method: Any, optimizer: Any, steps: Any) -> Plan:
    """The choices of a fit, checked."""
    _check_kinds(operator, network, method, optimizer)
    if steps is not None:
        check_count("fit", "steps", steps)
    chosen = method is None
    if method is None:
        operator, method = _method(operator)
    span = chosen and isinstance(operator, Differential)
    if isinstance(network, numbers.Integral):
        from lowrank_optax.spectral import networks as modules  # extra: flax

        network = modules.default(operator, int(network), shared=span)
    networks = networks_of(network, operator.sides)
    rounds = tuple(FIRST * (2 ** (k + 1) - 1) for k in range(ROUNDS))
    rounds = rounds if steps is None else (int(steps),)
    if optimizer is None:
        rate = NETWORK_RATE if operator.indices is None else TABLE_RATE
        optimizer = _optimizer(rate, None if steps is None else rounds[0], span)
    _check_match(operator, networks, method)
    return Plan(operator, networks, method, optimizer, rounds)


def _method(operator: SampledOperator) -> tuple[SampledOperator, Method]:
    """The method that suits an operator, and the operator as that method sees it."""
    if isinstance(operator, Differential):
        return operator, VariationalEnergy(floor=0.01)
    if operator.indices is not None and hasattr(operator, "everything"):
        fields: Any = {"everything": True}
        return dataclasses.replace(operator, **fields), NestedLoRA(moments=WholeBatch())
    if getattr(operator, "everything", False):
        return operator, NestedLoRA(moments=WholeBatch())
    return operator, NestedLoRA()


@cache
def _optimizer(rate: float, steps: int | None, whiten: bool) -> optax.GradientTransformation:
    """Adam, whose rate falls to 0 along a cosine: once, or in every round."""
    schedule = _rounds(rate) if steps is None else optax.cosine_decay_schedule(rate, steps)
    adam = optax.adam(schedule)
    if not whiten:
        return adam
    front = scale_by_lre(curvature.Covariance(), basis.GGT(20), inner.LInvSqrt())
    return optax.chain(front, adam)


def _rounds(rate: float) -> Callable[[Any], Any]:
    """A cosine for each round; round ``k`` has ``FIRST * 2^k`` steps."""

    def schedule(count: Any) -> Any:
        k = jnp.floor(jnp.log2(count / FIRST + 1 + 1e-6))
        done = (count - FIRST * (2**k - 1)) / (FIRST * 2**k)
        return rate * (1 + jnp.cos(math.pi * jnp.clip(done, 0, 1))) / 2

    return schedule


def _check_kinds(operator: Any, network: Any, method: Any, optimizer: Any) -> None:
    check(
        isinstance(operator, SampledOperator),
        f"fit: operator is {_short(operator)}; pass an operator of spectral.operators, such as "
        "Matrix(array).",
    )
    check(
        method is None or isinstance(method, Method),
        f"fit: method is {_short(method)}; pass an object such as "
        "NestedLoRA(SequentialNesting()), or leave it out.",
    )
    check(
        optimizer is None or (hasattr(optimizer, "init") and hasattr(optimizer, "update")),
        f"fit: optimizer is {_short(optimizer)}; pass an optax transformation such as "
        "optax.adam(0.003), or leave it out.",
    )
    check(
        not isinstance(network, bool | float | str | type | jax.Array),
        f"fit: network is {_short(network)}; pass a number of modes, a flax module, or a pair "
        "(init, apply).",
    )


def _short(part: Any) -> str:
    if isinstance(part, type):
        return f"the class {part.__name__}, not an object"
    if hasattr(part, "shape"):
        return f"an array of shape {part.shape}"
    return repr(part)


def _check_match(operator: SampledOperator, networks: tuple[Any, ...], method: Method) -> None:
    """Refuses parts that would give a wrong result together, and meshes that fail."""
    name = type(operator).__name__
    estimate = getattr(method, "moments", WholeBatch())
    check(
        not getattr(operator, "everything", False) or isinstance(estimate, WholeBatch),
        f"fit: the operator's batches are everything it has, in order, and {method!r} estimates "
        "moments from parts of them; pass moments=WholeBatch(), or leave out everything=True.",
    )
    check(
        not isinstance(estimate, UStatistic) or estimate.group % operator.group == 0,
        f"fit: {operator.group} rows of a {name} batch are one sample and "
        f"{estimate!r} would pair them with each other; pass UStatistic({operator.group}).",
    )
    differential = isinstance(operator, Differential)
    check(
        not (method.by_size and differential),
        f"fit: {method!r} seeks the eigenvalues of largest size, and a {name} has no lowest one; "
        "pass VariationalEnergy(floor=0.01) or NestedLoRA().",
    )
    kinked = any(getattr(getattr(n, "features", None), "kink", False) for n in networks)
    check(
        not (kinked and differential and operator.dimension == 1),
        "fit: the network's features have a kink and the operator is of second order on a line, "
        "where the kink's second derivative is a point mass that no sample sees; pass kink=False.",
    )
    if differential:
        _check_smooth(operator, networks)
    kinds = jax.sharding.get_abstract_mesh().axis_types
    check(
        jax.sharding.AxisType.Explicit not in kinds,
        f"fit: the current mesh has axes of the types {kinds}; make one with "
        "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto, ...)).",
    )


def _check_smooth(operator: Differential, networks: tuple[Any, ...]) -> None:
    point = jnp.zeros(operator.dimension)
    for network in networks:
        params = jax.eval_shape(lambda k: initialize(operator, networks, k)[0], jax.random.key(0))
        told = jax.make_jaxpr(network.apply)(params, point)
        check(
            not _kinks(told.jaxpr),
            "fit: the network has kinks (relu or the like) and the operator is of second order: "
            "their second derivative is a point mass that no sample sees; pass a smooth activation "
            "such as jax.nn.tanh.",
        )


def _kinks(jaxpr: Any) -> bool:
    """Whether a program takes a maximum with zero, as relu does."""
    for eqn in jaxpr.eqns:
        literal = (v.val for v in eqn.invars if isinstance(v, core.Literal))
        if eqn.primitive.name == "max" and any(_zero(v) for v in literal):
            return True
        for value in eqn.params.values():
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns") and _kinks(inside):
                return True
    return False


def _zero(value: Any) -> bool:
    return getattr(value, "ndim", 0) == 0 and float(value) == 0
