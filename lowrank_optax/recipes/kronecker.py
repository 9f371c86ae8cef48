"""Recipes that make the momentum of matrices orthogonal, or whiten it along both sides."""

from collections.abc import Callable, Hashable
from typing import Any, TypedDict, Unpack

import jax
import optax

from lowrank_optax import inner as inners
from lowrank_optax._core.checks import check_least
from lowrank_optax.engine.kronecker import scale_by_kronecker
from lowrank_optax.engine.orthogonal import scale_by_neuron_rms
from lowrank_optax.engine.views import View
from lowrank_optax.recipes._recipe import (
    collects,
    decay_weights,
    or_default,
    recipe,
    with_defaults,
)


class KroneckerOptions(TypedDict, total=False):
    """Keywords of `scale_by_kronecker` that are not in the signature of every recipe.

    Attributes:
      nesterov: whether the momentum looks one step ahead.
      crosswise: whether each side sees the gradient whitened by the other one.
      warmup_steps: number of first steps that build the sides and return zeros for the matrices.
      groups: function of a leaf's path to a label; matrices of one shape and label share sides.
      view: function of a leaf's path and shape to its `MatrixAxes` or ``None``.
      rest: optimizer of the leaves that are not matrices.
      seed: integer from which the first directions come.
    """

    nesterov: bool
    crosswise: bool
    warmup_steps: int
    groups: Callable[[Any], Hashable] | None
    view: View | None
    rest: optax.GradientTransformation | None
    seed: int


@collects
def soap_muon(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    beta: float = 0.95,
    eps: float = 1e-8,
    update_every: int | None = None,
    rms: float | None = 0.2,
    largest: int | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[KroneckerOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Whitened momentum made orthogonal, as Muon does with the momentum itself: for networks.

    `scale_by_kronecker` of both sides × ``RMSProp(b2)``, and a polar factor behind:

    .. math:: X \leftarrow X - \eta\,\rho\,\sqrt{\max(a, b)}\;
              \mathrm{polar}\bigl(Q_L\,\mathrm{RMSProp}(Q_L^T M\,Q_R)\,Q_R^T\bigr)

    for matrices ``(a, b)`` with Nesterov's momentum ``M`` and the eigenbases of KL-Shampoo. Muon
    makes the momentum orthogonal as it is, noise included. Here the momentum along every pair of
    eigendirections is first divided by its own root mean square. Sides of up to 128 have complete
    bases, longer ones keep 64 directions, and those of more than four times the other side, as
    embeddings and first layers have them, none. What is outside is divided by its own root mean
    square, one number for each direction of the other side. No step factorises a matrix, and none
    has a product with the cube of a side longer than 128 but the polar factor's.

    The first step only fills the sides: matrices get their weight decay, and no other update.
    Leaves that are not matrices, such as biases and scales, go through Adam with optax's decays.
    `diagnose.views` prints which leaf is seen how.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.soap_muon(optax.linear_schedule(1.0, 0.0, 200))
      >>> loss = lambda x: jnp.sum((x - jnp.outer(jnp.arange(3.0), jnp.arange(4.0))) ** 2)
      >>> x = jnp.zeros((3, 4)); state = tx.init(x); update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      learning_rate: schedule that falls, since steps do not shrink by themselves, or a number.
        Updates have the size of Adam's: start from 1.5e-2 for networks, and elsewhere from 1.5e-2
        times the distance that parameters have to go.
      rank: number of directions that either side keeps, beside one eigenvalue for all others;
        ``None`` (the default) for as many as is said above.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the second moment of the momentum's coordinates, in [0, 1).
      beta: decay of the sides' averages from one turn to the next, in [0, 1).
      eps: number added to the root, in units of the gradient.
      update_every: number of steps from one turn of a matrix's sides to the next, by default 3.
      rms: positive root mean square of the update of a matrix at learning rate 1. ``None`` leaves
        the whitened momentum as it is, whose steps shrink by themselves; deterministic,
        ill-conditioned problems such as physics-informed networks need that, and `soap` does it
        better.
      largest: sides longer than this keep 64 directions at most, by default 128.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_kronecker`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a rank, decay, ``eps``, ``rms`` or number of steps out of range.

    Cost: that of `scale_by_kronecker` and of `orthogonalize`; with ``r`` and ``s`` directions
    ``a b + r (a + r) + s (b + s) + (r + 1) (s + 1)`` numbers of state, for 768 × 3072 a good half
    of Adam's.

    Source: Jordan et al., "Muon", 2024; Vyas et al., "SOAP: Improving and Stabilizing Shampoo using
    Adam", 2024; Lin et al., 2025 (arXiv 2509.03378), for the sides; "Pro-KLShampoo", 2026 (arXiv
    2605.06316), for the spike and the flat rest with a polar factor.
    """
    if rms is not None:
        check_least("soap_muon", "rms", rms, strict=True)
    return _kronecker_recipe(
        learning_rate,
        weight_decay,
        mask,
        short=rank,
        long=rank,
        largest=or_default(largest, 128),
        aspect=4.0 if rank is None else None,
        inner=inners.RMSProp(b2, eps),
        b1=b1,
        beta=beta,
        orthogonal=rms,
        update_every=or_default(update_every, 3),
        **with_defaults(options, rest=optax.scale_by_adam(eps=eps)),
    )


@collects
def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    rms: float = 0.2,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[KroneckerOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Muon: Nesterov's momentum made orthogonal.

    `scale_by_kronecker` without any directions:

    .. math:: X \leftarrow X - \eta\,\rho\,\sqrt{\max(a, b)}\;\mathrm{polar}(M),\quad
              M \leftarrow b_1 M + (1-b_1) G

    Two things differ from the source: the polynomials of the Newton–Schulz steps, see
    `orthogonalize`, and the size of the update, which is that of Adam's. The first step is taken.
    Leaves that are not matrices go through Adam.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.muon(optax.linear_schedule(1.0, 0.0, 200))
      >>> loss = lambda x: jnp.sum((x - jnp.outer(jnp.arange(3.0), jnp.arange(4.0))) ** 2)
      >>> x = jnp.zeros((3, 4)); state = tx.init(x); update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-1)
      True

    Args:
      learning_rate: schedule that falls, or a number.
      b1: decay of the momentum, in [0, 1).
      rms: positive root mean square of the update of a matrix at learning rate 1.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_kronecker`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a decay or ``rms`` out of range.

    Cost: that of `orthogonalize`; ``a b`` numbers of state.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the
    scale of Liu et al., "Muon is Scalable for LLM Training", 2025.
    """
    check_least("muon", "rms", rms, strict=True)
    return _kronecker_recipe(
        learning_rate,
        weight_decay,
        mask,
        short=0,
        long=0,
        inner=inners.Sign(),  # one coordinate, the size, which the polar factor forgets
        b1=b1,
        orthogonal=rms,
        **with_defaults(options, warmup_steps=0),
    )


@collects
def normuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    rms: float = 0.2,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[KroneckerOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""NorMuon: Muon, then every neuron's row divided by its root mean square.

    With ``O``, ``(rows, columns)``, the orthogonal factor of the momentum:

    .. math:: v_i \leftarrow b_2 v_i + (1-b_2)\,\mathrm{mean}_j\,O_{ij}^2,\quad
              X \leftarrow X - \eta\,\rho\,\hat O / \mathrm{rms}(\hat O),\quad
              \hat O_{ij} = O_{ij} / \sqrt{v_i}

    `muon` and `scale_by_neuron_rms` in a chain. A neuron is a column of flax's kernels ``(in,
    out)``: what `MatrixAxes` calls columns.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.normuon(optax.linear_schedule(1.0, 0.0, 200))
      >>> loss = lambda x: jnp.sum((x - jnp.outer(jnp.arange(3.0), jnp.arange(4.0))) ** 2)
      >>> x = jnp.zeros((3, 4)); state = tx.init(x); update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-1)
      True

    Args:
      learning_rate: schedule that falls, or a number.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the neurons' second moments, in [0, 1).
      rms: positive root mean square of the update of a matrix at learning rate 1.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_kronecker`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a decay or ``rms`` out of range.

    Cost: that of `muon`, and one number of state for every neuron.

    Source: Li et al., "NorMuon: Making Muon more efficient and scalable", 2025 (arXiv 2510.05491).
    """
    check_least("normuon", "rms", rms, strict=True)
    return _kronecker_recipe(
        learning_rate,
        weight_decay,
        mask,
        scale_by_neuron_rms(b2, rms, view=options.get("view")),
        short=0,
        long=0,
        inner=inners.Sign(),
        b1=b1,
        orthogonal=rms,
        **with_defaults(options, warmup_steps=0),
    )


@collects
def kl_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.9,
    beta: float = 0.95,
    update_every: int | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[KroneckerOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""KL-Shampoo: momentum divided by the roots of both sides, each whitened by the other.

    `scale_by_kronecker` of both sides × ``LInvSqrt``:

    .. math:: X \leftarrow X - \eta\,L^{-1/2} M R^{-1/2},\quad
              L \leftarrow \beta L + (1-\beta)\,\tfrac1b\,G R^{-1} G^T,\quad
              R \leftarrow \beta R + (1-\beta)\,\tfrac1a\,G^T L^{-1} G

    Two things differ from the paper: eigenvectors follow by rotations in place of QR, and the
    average is over the gradients of the steps that turn. With a ``rank`` each side keeps that many
    directions and one eigenvalue for all others. Leaves that are not matrices go through Adam.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.kl_shampoo(optax.linear_schedule(0.5, 0.0, 200))
      >>> loss = lambda x: jnp.sum((x - jnp.outer(jnp.arange(3.0), jnp.arange(4.0))) ** 2)
      >>> x = jnp.zeros((3, 4)); state = tx.init(x); update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-1)
      True

    Args:
      learning_rate: number or schedule.
      rank: number of directions that either side keeps; ``None`` (the default) for all.
      b1: decay of the momentum, in [0, 1).
      beta: decay of the sides' averages from one turn to the next, in [0, 1).
      update_every: number of steps from one turn of a matrix's sides to the next, by default 3.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_kronecker`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a rank, decay or number of steps out of range.

    Cost: that of `scale_by_kronecker`; ``2 a² + 2 b² + a b`` numbers of state.

    Source: Lin et al., "Understanding and improving Shampoo and SOAP via Kullback-Leibler
    minimization", ICLR 2026 (arXiv 2509.03378).
    """
    return _kronecker_recipe(
        learning_rate,
        weight_decay,
        mask,
        short=rank,
        long=rank,
        inner=inners.LInvSqrt(),
        b1=b1,
        beta=beta,
        update_every=or_default(update_every, 3),
        **with_defaults(options, nesterov=False),
    )


@collects
def kl_soap(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    beta: float = 0.95,
    eps: float = 1e-8,
    update_every: int | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Unpack[KroneckerOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""KL-SOAP: momentum divided by its root mean square in the eigenbases of KL-Shampoo.

    `scale_by_kronecker` of both sides × ``RMSProp(b2)``:

    .. math:: X \leftarrow X - \eta\,Q_L\,\mathrm{RMSProp}(Q_L^T M Q_R)\,Q_R^T

    with the sides of `kl_shampoo`. Three things differ from the paper: the second moment is that of
    the momentum, not of the gradient; it stays as it is when the bases turn; eigenvectors follow by
    rotations in place of QR. With a ``rank`` each side keeps that many directions, and what is
    outside is divided by its own root mean square. Leaves that are not matrices go through Adam.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.kl_soap(optax.linear_schedule(0.3, 0.0, 200))
      >>> loss = lambda x: jnp.sum((x - jnp.outer(jnp.arange(3.0), jnp.arange(4.0))) ** 2)
      >>> x = jnp.zeros((3, 4)); state = tx.init(x); update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-1)
      True

    Args:
      learning_rate: number or schedule.
      rank: number of directions that either side keeps; ``None`` (the default) for all.
      b1: decay of the momentum, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      beta: decay of the sides' averages from one turn to the next, in [0, 1).
      eps: number added to the root, in units of the gradient.
      update_every: number of steps from one turn of a matrix's sides to the next, by default 3.
      weight_decay: strength of the decoupled weight decay, which the learning rate multiplies; 0 by
        default.
      mask: tree of booleans, or a function of the parameters that returns one, true for the leaves
        that decay; all of them by default (``None``).
      **options: keywords of `scale_by_kronecker`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a rank, decay, ``eps`` or number of steps out of range.

    Cost: that of `scale_by_kronecker`; ``2 a² + 2 b² + 2 a b`` numbers of state.

    Source: Lin et al., "Understanding and improving Shampoo and SOAP via Kullback-Leibler
    minimization", ICLR 2026 (arXiv 2509.03378).
    """
    return _kronecker_recipe(
        learning_rate,
        weight_decay,
        mask,
        short=rank,
        long=rank,
        inner=inners.RMSProp(b2, eps),
        b1=b1,
        beta=beta,
        update_every=or_default(update_every, 3),
        **with_defaults(options, rest=optax.scale_by_adam(eps=eps)),
    )


def _kronecker_recipe(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any,
    mask: Any,
    then: optax.GradientTransformation = optax.identity(),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_kronecker`, decoupled weight decay, learning rate."""
    return recipe(
        scale_by_kronecker(**options),
        then,
        decay_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
