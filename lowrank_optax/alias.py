"""Named recipes: optimizers ready for use, each a point of curvature × basis × inner."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from lowrank_optax import basis as bases
from lowrank_optax import curvature as curvatures
from lowrank_optax import inner as inners
from lowrank_optax._types import Inner, check_least
from lowrank_optax.transform import scale_by_lre


def lre(
    learning_rate: optax.ScalarOrSchedule,
    curvature: curvatures.Curvature = curvatures.Covariance(),
    basis: bases.Basis = bases.GGT(rank=100),
    inner: Inner | Sequence[Inner] = (
        inners.Adam(),
        inners.Cautious(),
        inners.ClipNormByEMA(normalize=True),
    ),
    *,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-rank eigenbasis optimizer: `scale_by_lre`, decoupled weight decay, learning rate.

    .. math:: x \leftarrow x - \eta\,\bigl(Q\,\mathrm{inner}(Q^T g) + \lambda_{wd}\, x\bigr)

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.lre(1e-1, basis=lro.basis.GGT(rank=10))
      >>> loss = lambda x: jnp.sum((x - jnp.arange(3.0)) ** 2)
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(300):
      ...     updates, state = tx.update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      learning_rate: a number or a schedule. With the default inner parts an update's norm follows
        the running average of Adam's updates in the basis.
      curvature: what is measured.
      basis: how it is kept.
      inner: what runs inside.
      weight_decay: strength of the decoupled weight decay, multiplied by the learning rate.
      mask: a tree of booleans, or a function that gives one, of the leaves that decay.
      **options: the keywords of `scale_by_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: as `scale_by_lre`; and by ``update`` for weight decay without params.

    Cost: that of `scale_by_lre`.

    Source: the original LRE's recommended recipe.
    """
    if not isinstance(weight_decay, jax.Array):
        check_least("lre", "weight_decay", weight_decay)
    # optax.inject_hyperparams hands collected keywords back under their own name; they stay static.
    options = {**options.pop("options", {}), **options}
    return optax.chain(
        scale_by_lre(curvature, basis, inner, **options),
        _decay_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _decay_weights(strength, mask) -> optax.GradientTransformation:
    """optax's decoupled weight decay, which asks for params only if there is any to apply."""
    inner = optax.add_decayed_weights(strength, mask)

    def update(updates, state, params=None):
        if params is None:
            if not isinstance(strength, jax.Array) and strength == 0:
                return updates, state
            raise ValueError(f"lre: weight_decay is {strength}, which needs the parameters; call "
                             "tx.update(grads, state, params).")
        return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)
