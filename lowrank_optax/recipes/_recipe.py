"""What recipes share: one optimizer made of an engine and what stands behind it; their options."""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ParamSpec, TypedDict, TypeVar, cast

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core.checks import check_least
from lowrank_optax._core.entry import own_arguments
from lowrank_optax._core.states import advance_where_taken, at_least_float32
from lowrank_optax.curvature import SideCurvature
from lowrank_optax.engine.views import View
from lowrank_optax.inner import LPower

OWNER = "recipe"

P = ParamSpec("P")
T = TypeVar("T")

Period = int | Callable[[jax.Array], jax.Array]
"""Steps between two updates, or a schedule of the number of steps taken."""


class VectorOptions(TypedDict, total=False):
    """Keywords of `scale_by_lre` for recipes that have an ``update_every`` of their own.

    Attributes:
      warmup_steps: number of first steps that build the basis and return zeros.
      symmetrize: whether a correction ``y z^T`` enters as one column ``(y + z)/2``.
      complement: what becomes of the gradient outside the basis.
      groups: function of a leaf's path to a label; leaves with one label share a basis.
      dtype: dtype of the stored rows.
      axis_name: names of the axes over which the devices have parts of a batch.
      seed: integer from which random draws come.
    """

    warmup_steps: int
    symmetrize: bool
    complement: float | jax.Array | LPower | optax.GradientTransformation | None
    groups: Callable[[Any], Hashable] | None
    dtype: Any
    axis_name: str | Sequence[str] | None
    seed: int


class PeriodicVectorOptions(VectorOptions, total=False):
    """Keywords of `scale_by_lre` for all other recipes.

    Attributes:
      update_every: number of steps between two updates of the basis, or a schedule of it.
    """

    update_every: Period


class MatrixOptions(TypedDict, total=False):
    """Keywords of `scale_by_matrix_lre` that are not in the signature of every matrix recipe.

    Attributes:
      curvature: part that says what the bases learn from.
      warmup_steps: number of first steps that build the bases and return zeros for the matrices.
      groups: function of a leaf's path to a label; matrices of one shape and label share bases.
      view: function of a leaf's path and shape to its `MatrixAxes`, or ``None``.
      rest: optimizer of the leaves that are not matrices.
      complement: what becomes of the gradient outside the bases.
      dtype: dtype of the stored rows.
      seed: integer from which random draws come.
    """

    curvature: SideCurvature
    warmup_steps: int
    groups: Callable[[Any], Hashable] | None
    view: View | None
    rest: optax.GradientTransformation | None
    complement: float | jax.Array | optax.GradientTransformation | None
    dtype: Any
    seed: int


def recipe(
    head: optax.GradientTransformationExtraArgs, *behind: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """``head``, one of this library's engines, and behind it transformations of optax.

    The state is that of ``optax.chain(head, *behind)``; see `Recipe` for what is different.
    """
    made = Recipe(cast(Any, head.update).__self__, optax.chain(*behind))
    return optax.GradientTransformationExtraArgs(made.init, made.update)


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """An engine, then optax transformations whose states a bad step leaves as they were.

    A leaf that the engine drops, because something was not finite, gets a zero update: no weight
    decay and no step of a momentum, and the states behind the engine do not change for it. The
    transformations get updates in float32 at least, whatever the parameters' dtype, because optax's
    ``eps`` of 1e-8 is zero in float16. The updates that come out have the dtype to which gradient
    and parameter promote, as those of optax have.
    """

    engine: Any
    behind: Any

    def init(self, params: Any):
        return self.engine.init(params), *self.behind.init(at_least_float32(params))

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any):
        engine, chain = self.engine, self.behind
        params, extra = own_arguments(OWNER, updates, params, extra)
        first, old = state[0], tuple(state[1:])
        step, first, dropped = engine.step(at_least_float32(updates), first, params, extra)
        if not dropped:  # a tree without leaves
            return updates, (first, *old)
        layout = engine.layout(updates, state[0], params)
        on = [~bad for bad in dropped]
        visible = None if params is None else at_least_float32(params)
        step, new = chain.update(step, old, visible, **extra)
        step = [jnp.where(ok, x, 0) for ok, x in zip(on, layout.leaves(step), strict=True)]
        new = advance_where_taken(chain, layout, on, new, old)
        return layout.shaped(step, updates), (first, *new)


def collects(make: Callable[P, T]) -> Callable[P, T]:
    """A recipe whose ``**options`` may also come as one argument ``options``.

    `optax.inject_hyperparams` passes collected keywords on in this way.
    """

    @functools.wraps(make)
    def run(*args: Any, options: dict[str, Any] | None = None, **kwargs: Any):
        return cast(Any, make)(*args, **(options or {}), **kwargs)

    return cast(Any, run)


def with_defaults(options: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """The options that a caller passed, and defaults for those that are not among them."""
    return {**defaults, **options}


def or_default(size: int | None, otherwise: int) -> int:
    """The size, or ``otherwise`` for ``None``.

    ``None`` is the default of a size because `optax.inject_hyperparams` traces default numbers, and
    shapes depend on sizes.
    """
    return otherwise if size is None else size


def decay_weights(strength: Any, mask: Any) -> optax.GradientTransformation:
    """Weight decay as in optax, which needs the parameters only if there is any decay."""
    if not callable(strength):
        check_least("weight decay", "weight_decay", strength)
    rate: Any = strength
    inner = optax.add_decayed_weights(rate, mask)

    def update(updates, state, params=None):
        if params is None:
            if isinstance(strength, numbers.Real) and strength == 0:
                return updates, state
            raise ValueError(
                f"weight_decay is {strength}, which needs the parameters; call "
                "tx.update(grads, state, params)."
            )
        return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)
