"""Named recipes: optimizers ready for use, each a point of curvature × basis × inner."""

import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import _linalg
from lowrank_optax import basis as bases
from lowrank_optax import curvature as curvatures
from lowrank_optax import inner as inners
from lowrank_optax._recipe import collects, recipe
from lowrank_optax._types import SCALAR, SECOND_MOMENT, VECTOR, Inner, check, check_least
from lowrank_optax.matrix import matrix_engine, orthogonalize, scale_by_matrix_lre
from lowrank_optax.transform import vector_engine

MATRIX_OPTIONS = inspect.signature(scale_by_matrix_lre).parameters.keys() - {
    "short",
    "long",
    "inner",
}
"""Keywords that the recipes for matrices hand on."""


@collects
def lre(
    learning_rate: optax.ScalarOrSchedule,
    curvature: curvatures.Curvature | None = None,
    basis: bases.Basis | None = None,
    inner: Inner | Sequence[Inner] | None = None,
    *,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Low-rank eigenbasis optimizer; with a learning rate alone, the recipe to start from.

    Without any part it is `polar_soap`: eigenbases on the sides of every matrix, Adam for
    everything else. With one named it is `scale_by_lre` of curvature, basis and inner parts,
    decoupled weight decay, and the learning rate:

    .. math:: x \leftarrow x - \eta\,\bigl(Q\,\mathrm{inner}(Q^T g) + \lambda_{wd}\, x\bigr)

    Parts that are left out are then those of the original LRE: ``Covariance()``, ``GGT(100)`` and
    ``(Adam(), Cautious(), ClipNormByEMA(normalize=True))``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.lre(optax.linear_schedule(1e-2, 0.0, 1000))      # for a network
      >>> tx = lro.lre(1e-1, basis=lro.basis.GGT(rank=10))          # the original, of rank 10
      >>> loss = lambda x: jnp.sum((x - jnp.arange(3.0)) ** 2)
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(300):
      ...     updates, state = jax.jit(tx.update)(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      learning_rate: a number or a schedule. Without any part updates have the size of Adam's: a
        schedule that falls from 1e-2 times the distance that parameters have to go, in units of
        a network's weights, ended below the tuned AdamW on all nine tasks of
        `benchmarks/optimizers.py`. With the original's inner parts an update's norm follows the
        running average of Adam's updates in the basis; start a hundred times higher.
      curvature: what is measured.
      basis: how it is kept.
      inner: what runs inside.
      weight_decay: strength of the decoupled weight decay, multiplied by the learning rate.
      mask: a tree of booleans, or a function that gives one, of the leaves that decay.
      **options: the keywords of `scale_by_lre`; without any part those of `polar_soap`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: as `scale_by_lre`; for its keywords where no part is named; and by ``update`` for
        weight decay without params.

    Cost: that of `scale_by_lre`; without any part that of `polar_soap`.

    Source: the original LRE for the parts; for the recipe without any see `polar_soap`.
    """
    if curvature is None and basis is None and inner is None:
        known = inspect.signature(polar_soap).parameters.keys() | MATRIX_OPTIONS
        wrong = sorted(options.keys() - known)
        check(
            not wrong,
            f"lre: {', '.join(wrong)} came without a curvature, basis or inner part; name one, "
            "such as basis=lro.basis.GGT(100), or pass the keywords of lro.polar_soap only.",
        )
        return polar_soap(learning_rate, weight_decay=weight_decay, mask=mask, **options)
    curvature = curvatures.Covariance() if curvature is None else curvature
    basis = bases.GGT(rank=100) if basis is None else basis
    if inner is None:
        inner = inners.Adam(), inners.Cautious(), inners.ClipNormByEMA(normalize=True)
    return recipe(
        vector_engine(curvature, basis, inner, **options),
        _decay_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@collects
def ggt(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.9,
    eps: float = 1e-2,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""GGT: the full-matrix adaptive method on a window of the last gradients.

    ``Covariance() × GGT(rank) × (EMA(b1), LInvSqrt())``, with ``1/eps`` on the complement:

    .. math:: x \leftarrow x - \eta\,(G G^T + \epsilon^2 I)^{-1/2}\,\hat m,\quad
              G = [g_t, \dots, g_{t-r+1}]

    The paper adds ``eps`` to the root where this adds ``eps²`` under it; both are ``1/eps`` outside
    the window, where the newest gradient has only what rounding cannot tell from zero.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.ggt(0.3, rank=20)
      >>> loss = lambda x: jnp.sum((x - jnp.arange(3.0)) ** 2)
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(100):
      ...     updates, state = jax.jit(tx.update)(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      learning_rate: a number or a schedule.
      rank: the window's length. Keep it above ``1/(1-b1)``: where gradients shrink, a momentum that
        remembers larger ones than the window does is not scaled down with them.
      b1: decay of the momentum.
      eps: in units of the gradient's norm: well below it, or the step becomes ``g/eps``, but not
        below rounding, ``1e-3`` of it in float32. Multiply it along with the loss.
      **options: the keywords of `lre` and `scale_by_lre`.

    Raises:
      ValueError: for a rank, decay or ``eps`` out of range.

    Cost: that of `GGT`.

    Source: Agarwal et al., "Efficient Full-Matrix Adaptive Regularization", ICML 2019.
    """
    check_least("ggt", "eps", eps, strict=True)
    return lre(
        learning_rate,
        curvatures.Covariance(),
        bases.GGT(_default(rank, 100), eig_tol=0.0, update_damping=eps**2),
        (inners.EMA(b1, debias=True), inners.LInvSqrt()),
        **{"complement": 1 / eps, **options},
    )


@collects
def full_matrix_adam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-16,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with the full matrix of second moments, in the span of the last gradients.

    ``Covariance() × GGT(rank) × FullMatrixAdam(identity=False)``:

    .. math:: x \leftarrow x - \eta\, Q\,(\hat M + \epsilon I)^{-1/2}\, \hat m

    with ``M`` the average of ``u u^T`` and ``m`` that of ``u = Q^T g``, both from zero and
    corrected for it, and the pseudo-inverse of the root: what no gradient has shown does not move.
    The original starts ``M`` as the identity: that is ``lre`` with ``inner=FullMatrixAdam()``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.full_matrix_adam(0.1, rank=10)
      >>> loss = lambda x: jnp.sum((x - jnp.arange(3.0)) ** 2)
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(300):
      ...     updates, state = jax.jit(tx.update)(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      learning_rate: a number or a schedule, as for Adam: an update has about the length 1 along
        every principal axis of the gradients seen, where Adam's has it along every coordinate. The
        first has one axis, and all of ``d`` coordinates with equal gradients are Adam's divided by
        ``sqrt(d)``.
      rank: the window's length.
      b1: decay of the mean.
      b2: decay of the covariance.
      eps: added to the covariance's eigenvalues, in units of the squared gradient: the square of
        Adam's.
      **options: the keywords of `lre` and `scale_by_lre`.

    Raises:
      ValueError: for a rank, decay or ``eps`` out of range.

    Cost: that of `GGT` and a second ``eigh`` of size ``rank`` a step.

    Source: full-matrix AdaGrad, Duchi et al., JMLR 2011, with the averages of Adam.
    """
    return lre(
        learning_rate,
        curvatures.Covariance(),
        bases.GGT(_default(rank, 100)),
        inners.FullMatrixAdam(b1, b2, eps, identity=False),
        **options,
    )


@collects
def whiten(
    rank: int | None = None, *, power: float = -0.25, **options: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Whitens gradients in the span of the last ones; stands in front of any optimizer.

    ``Covariance() × GGT(rank, beta=1) × LPower(power)``:

    .. math:: g \mapsto Q\,\Lambda^{p}\,Q^T g,\quad
              Q \Lambda Q^T = \frac{1}{r} \sum_{i<r} g_{t-i}\, g_{t-i}^T

    What is loud becomes quieter, and quieter directions are heard. ``p = -1/4`` leaves the learning
    rate of what stands behind as it was; ``p = -1/2`` gains more on ill-conditioned problems, at
    smaller rates, and loses where gradients are mostly noise.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = optax.chain(lro.whiten(rank=10), optax.adam(optax.linear_schedule(0.3, 0.0, 200)))
      >>> loss = lambda x: jnp.sum((x - 1) ** 2 * jnp.array([1.0, 10.0, 100.0]))
      >>> x = jnp.zeros(3); state = tx.init(x); update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-4)
      True

    Args:
      rank: the window's length.
      power: of the eigenvalues.
      **options: the keywords of `scale_by_lre`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: for a rank out of range.

    Cost: that of `GGT`: memory ``rank d``, two passes over it a step.

    Source: the window is that of Agarwal et al., "Efficient Full-Matrix Adaptive Regularization",
    ICML 2019; the power and the order were found by `benchmarks/optimizers.py`.
    """
    engine = _whitening(rank, power, **options)
    return optax.GradientTransformationExtraArgs(engine.init, engine.update)


def _whitening(rank, power, **options: Any):
    """The engine of `whiten`."""
    basis, part = bases.GGT(_default(rank, 50), beta=1.0), inners.LPower(power)
    return vector_engine(curvatures.Covariance(), basis, part, **{"complement": part, **options})


@collects
def whitened_adam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    power: float = -0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam on gradients that are whitened in the span of the last ones: `whiten`, then Adam.

    .. math:: x \leftarrow x - \eta\,\mathrm{Adam}\bigl(Q\,\Lambda^{p}\,Q^T g\bigr)

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.whitened_adam(optax.linear_schedule(0.3, 0.0, 200), rank=10)
      >>> loss = lambda x: jnp.sum((x - 1) ** 2 * jnp.array([1.0, 10.0, 100.0]))
      >>> x = jnp.zeros(3); state = tx.init(x); update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-4)
      True

    Args:
      learning_rate: a number or a schedule, as for Adam.
      rank: the window's length.
      power: of the eigenvalues.
      b1: decay of Adam's mean.
      b2: decay of Adam's second moment.
      eps: added to Adam's root.
      weight_decay: strength of the decoupled weight decay, multiplied by the learning rate.
      mask: a tree of booleans, or a function that gives one, of the leaves that decay.
      **options: the keywords of `scale_by_lre`.

    Raises:
      ValueError: for a rank out of range.

    Cost: that of `whiten` and of Adam.

    Source: as `whiten`.
    """
    return recipe(
        _whitening(rank, power, **options),
        optax.scale_by_adam(b1, b2, eps),
        _decay_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@collects
def lowrank_newton(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    rank: int | None = None,
    *,
    rdamping: float = 1e-3,
    curvature: curvatures.Curvature = curvatures.BFGS(),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method with a low-rank quasi-Newton matrix and a scaled identity around it.

    ``BFGS() × Eigen(rank, beta=None) × LInv()``, with ``LInv()`` on the complement:

    .. math:: x \leftarrow x - \eta\, B^{-1} g,\quad
              B = Q\,\mathrm{diag}(\lambda)\,Q^T + \gamma\,(I - Q Q^T)

    Eigenvalues count with their size, so that `SR1`'s negative ones are no ways up, and with
    ``rdamping`` times the largest on top: without, an eigenvalue that a noisy pair or `SR1` puts
    near zero makes one step so long that the next pairs are worthless. There is no line search:
    where a full step is too long pass a smaller ``learning_rate``, or chain the result with
    `optax.scale_by_zoom_linesearch`. Needs ``value_fn`` in ``update``, and the parameters;
    ``curvature=BFGS(product=GradientDifference())`` needs the parameters only.
    Where the Hessian may be singular, `CubicNewton` in place of ``LInv()`` bounds the step.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.lowrank_newton(rank=3)
      >>> loss = lambda x: jnp.sum((x - 1) ** 2 * jnp.array([1., 10., 100.]))
      >>> update = jax.jit(lambda g, state, x: tx.update(g, state, x, value_fn=loss))
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(30):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-6)
      True

    Args:
      learning_rate: 1 for Newton's step.
      rank: how many eigenpairs of the quasi-Newton matrix are kept.
      rdamping: share of the largest eigenvalue that is added to all for the step; 0 for the exact
        inverse.
      curvature: `BFGS` or `SR1`.
      **options: the keywords of `lre` and `scale_by_lre`.

    Raises:
      ValueError: for a rank or damping out of range, or a curvature that is no correction of the
        matrix; by ``update`` without ``value_fn``.

    Cost: that of `Eigen`, two more passes over the rows and one Hessian product an update.

    Source: Broyden, Fletcher, Goldfarb and Shanno, 1970, and Brand's truncation, 2006, in place of
    the memory of L-BFGS.
    """
    check(
        "initial" in getattr(curvature, "needs", ()),
        f"lowrank_newton sums corrections, those of {curvature} are for an average; combine it "
        "with BFGS or SR1, or pass the other to lro.lre with "
        "basis=lro.basis.Eigen(rank, beta=0.99).",
    )
    return lre(
        learning_rate,
        curvature,
        bases.Eigen(
            _default(rank, 20),
            None,
            eig_tol=1e-8,
            update_damping=0.0,
            update_rdamping=rdamping,
            update_abs=True,
        ),
        inners.LInv(),
        **{"complement": inners.LInv(), **options},
    )


@collects
def adahessian(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    curvature: curvatures.Curvature = curvatures.SquaredHessian(),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaHessian on the Hessian's diagonal in its own leading eigenbasis.

    ``SquaredHessian() × Eigen(rank, eig_tol=1e-8) × HutchinsonAdam()``, with ``1/h`` on the
    complement:

    .. math:: x \leftarrow x - \eta\,\Bigl(Q\, \frac{\hat m}{\sqrt{\hat D} + \epsilon}
              + \frac{g - Q Q^T g}{h}\Bigr),\quad
              D \leftarrow b_2 D + (1-b_2)\,\bigl(Q^T z \circ Q^T H z\bigr)^2

    In the eigenbasis the diagonal is most of the Hessian, which along the parameters' axes it is
    not. Outside it ``h`` is the root mean square eigenvalue there, from the same products: the
    rule applied to one shared value. ``complement=None`` keeps to the basis, which is safe where
    curvature outside varies by more than ``2 / learning_rate`` around ``h``. Needs ``value_fn`` in
    ``update``, and the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.adahessian(0.1, rank=3)
      >>> loss = lambda x: jnp.sum((x - 1) ** 2 * jnp.array([1., 10., 100.]))
      >>> update = jax.jit(lambda g, state, x: tx.update(g, state, x, value_fn=loss))
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-3)
      True

    Args:
      learning_rate: relative to Newton's step along the basis, which is about 1.
      rank: how many eigenpairs are kept.
      b1: decay of the mean.
      b2: decay of the squared estimates, an update of the basis.
      eps: added to the root, in units of the curvature.
      curvature: what gives the products.
      **options: the keywords of `lre` and `scale_by_lre`; ``update_every`` for rarer products.

    Raises:
      ValueError: for a rank, decay or ``eps`` out of range; by ``update`` without ``value_fn``.

    Cost: that of `Eigen`, and two Hessian products and one more pass over the rows on every update
    of the basis: of the first the basis is made, with the second it is measured.

    Source: Yao et al., "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning", AAAI
    2021.
    """
    return lre(
        learning_rate,
        curvature,
        bases.Eigen(_default(rank, 20), eig_tol=1e-8),
        inners.HutchinsonAdam(b1, b2, eps),
        **{"complement": _newton_outside(curvature), **options},
    )


@collects
def sophia_h(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.965,
    b2: float = 0.99,
    eps: float = 1e-12,
    gamma: float = 0.01,
    update_every: int | Callable[[jax.Array], jax.Array] = 10,
    curvature: curvatures.Curvature = curvatures.SquaredHessian(),
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Sophia-H on the Hessian's diagonal in its own leading eigenbasis.

    ``SquaredHessian() × Eigen(rank, eig_tol=1e-8) × (HutchinsonAdam(gamma=gamma, debias=False),
    ClipValue(1))``, with ``1/s`` on the complement:

    .. math:: x \leftarrow x - \eta\, \Bigl(Q\, \mathrm{clip}\!\left(
              \frac{m}{\max(\gamma h, \epsilon)}, 1\right)
              + \frac{g - Q Q^T g}{s}\Bigr),\quad
              h \leftarrow b_2 h + (1-b_2)\; Q^T z \circ Q^T H z

    Outside the basis ``s`` is the root mean square eigenvalue there, from the same products; the
    step is a share of Newton's and is not clipped. ``complement=None`` keeps to the basis;
    ``complement=optax.scale_by_adam()`` has steps of the clipped ones' size, at two vectors of
    state. Needs ``value_fn`` in ``update``, and the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.sophia_h(0.01, rank=3)
      >>> loss = lambda x: jnp.sum((x - 1) ** 2 * jnp.array([1., 3., 9.]))
      >>> update = jax.jit(lambda g, state, x: tx.update(g, state, x, value_fn=loss))
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(300):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 0.1)
      True

    Args:
      learning_rate: the largest step along any direction of the basis.
      rank: how many eigenpairs are kept.
      b1: decay of the mean.
      b2: decay of the diagonal, an update of the basis.
      eps: the least denominator, in units of the curvature.
      gamma: share of the curvature in the denominator: the larger, the fewer steps are clipped.
      update_every: steps between two Hessian products.
      curvature: what gives the products.
      **options: the keywords of `lre` and `scale_by_lre`.

    Raises:
      ValueError: for a rank, decay, ``eps`` or ``gamma`` out of range; by ``update`` without
        ``value_fn``.

    Cost: that of `Eigen`, and two Hessian products and one more pass over the rows on every update
    of the basis: of the first the basis is made, with the second it is measured.

    Source: Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
    Pre-training", 2023.
    """
    return lre(
        learning_rate,
        curvature,
        bases.Eigen(_default(rank, 20), eig_tol=1e-8),
        (inners.HutchinsonAdam(b1, b2, eps, gamma, debias=False), inners.ClipValue(1.0)),
        update_every=update_every,
        **{"complement": _newton_outside(curvature), **options},
    )


def _newton_outside(curvature: curvatures.Curvature) -> inners.LPower:
    """The power of the curvature outside the basis that is one over the size of a Hessian's."""
    squared = isinstance(curvature, curvatures.SquaredHessian)
    return inners.LInvSqrt() if squared else inners.LInv()


@collects
def natural_gradient(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    beta: float = 0.9,
    damping: float = 1.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Online natural gradient: the running average of the empirical Fisher matrix, inverted.

    ``EmpiricalFisher() × Eigen(rank, beta, count_columns=False, damp_first=False) × LInv()``, with
    ``1/damping`` on the complement:

    .. math:: x \leftarrow x - \eta\,(\hat F_r + \mu I)^{-1} g,\quad
              F \leftarrow \beta F + (1-\beta) \sum_i g_i g_i^T

    with ``F_r`` the ``rank`` leading eigenpairs of ``F``, corrected for its start. No direction has
    a longer step than gradient descent of rate ``learning_rate / damping``, which is the step
    outside the basis, inside where the gradients are small, and thus near an optimum. The default
    damping makes that rate the learning rate itself: the recipe is stable where gradient descent of
    the same rate is. The first step only fills the basis. Needs ``losses_fn`` and the parameters,
    or ``per_example_grads``, in ``update``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.natural_gradient(0.3, rank=3, damping=10.0)
      >>> a = jax.random.normal(jax.random.key(0), (16, 3))
      >>> losses = lambda x: (a @ (x - 1)) ** 2 / 2
      >>> loss = lambda x: jnp.sum(losses(x))
      >>> update = jax.jit(lambda g, state, x: tx.update(g, state, x, losses_fn=losses))
      >>> x = jnp.zeros(3); state = tx.init(x)
      >>> for _ in range(50):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      learning_rate: a number or a schedule; ``damping`` times the rate of gradient descent on the
        summed loss, or less.
      rank: how many eigenpairs are kept.
      beta: decay of the average.
      damping: ``mu``, added to all eigenvalues, those outside the basis included; in units of the
        summed squared gradients, below the largest of which it has to be to change anything.
      **options: the keywords of `lre` and `scale_by_lre`.

    Raises:
      ValueError: for a rank, decay or damping out of range; by ``update`` without per-example
        losses or gradients.

    Cost: that of `Eigen`, and the gradients of all examples on every update of the basis.

    Source: Le Roux, Manzagol and Bengio, "Topmoumoute online natural gradient algorithm", NIPS
    2007.
    """
    check_least("natural_gradient", "damping", damping, strict=True)
    return lre(
        learning_rate,
        curvatures.EmpiricalFisher(),
        bases.Eigen(
            _default(rank, 20), beta, count_columns=False, damp_first=False, update_damping=damping
        ),
        inners.LInv(),
        **{"warmup_steps": 1, "complement": 1 / damping, **options},
    )


@collects
def gauss_newton(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    batch: int | None = None,
    *,
    damping: float = 1e-3,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Damped Gauss-Newton in the dual: exact on the current batch, at any number of parameters.

    ``GaussNewton() × GGT(rank=batch, renew=True) × LInv()``: the window holds the rows of this
    step's Jacobian and no older ones,

    .. math:: x \leftarrow x - \eta\,(J^T J + \mu I)^{-1} J^T r
              = x - \eta\, J^T (J J^T + \mu I)^{-1} r

    The gradient has to be ``J^T r``, that of ``‖r‖²/2``. Needs ``residuals_fn`` and the parameters
    in ``update``. For deterministic problems, and for small residuals in float32, there is
    `lowrank_optax.levenberg_marquardt`, whose damping adapts.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> a = jax.random.normal(jax.random.key(0), (4, 9))
      >>> residuals = lambda x: a @ x - 1
      >>> loss = lambda x: jnp.sum(residuals(x) ** 2) / 2
      >>> tx = lro.gauss_newton(batch=4, damping=1e-6)
      >>> x = jnp.zeros(9); state = tx.init(x)
      >>> updates, state = tx.update(jax.grad(loss)(x), state, x, residuals_fn=residuals)
      >>> bool(loss(x + updates) < 1e-6)                  # linear: one step
      True

    Args:
      learning_rate: 1 for the Gauss-Newton step.
      batch: the most residuals that come at once, ``k``; fewer leave rows empty.
      damping: Levenberg's ``mu``, in units of the squared gradients of the residuals.
      **options: the keywords of `lre` and `scale_by_lre`.

    Raises:
      ValueError: for a batch or damping out of range; by ``update`` without ``residuals_fn``, and
        for more residuals than ``batch``.

    Cost: memory ``k d``; a step ``k`` gradients, ``2 k² d`` flops and one ``eigh`` of size ``k``.

    Source: Levenberg, 1944; Ren and Goldfarb, "Efficient subsampled Gauss-Newton and natural
    gradient methods for training neural networks", 2019, for the dual form.
    """
    return lre(
        learning_rate,
        curvatures.GaussNewton(),
        bases.GGT(_default(batch, 100), renew=True, eig_tol=0.0, update_damping=damping),
        inners.LInv(),
        **options,
    )


@collects
def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    update_every: int | Callable[[jax.Array], jax.Array] = 200,
    scale: float = 0.25,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore: Adam in the leading singular directions of every matrix's gradient.

    ``SubspaceIteration(rank, beta=0)`` on the shorter side × ``Adam``, now and then anew:

    .. math:: X \leftarrow X - \eta\,\alpha\,P\,\mathrm{Adam}(P^T G),\quad
              P = [p_1, \dots, p_r],\ G G^T p_i = \sigma_i^2 p_i

    The paper takes ``P`` from a full singular value decomposition and leaves Adam's moments as they
    are when ``P`` changes; here a randomised one with the last ``P`` for a start, and the moments
    move with it. All leaves that are no matrices go through Adam.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.galore(0.1, rank=2, update_every=20, scale=1.0)
      >>> loss = lambda x: jnp.sum((x - jnp.outer(jnp.arange(3.0), jnp.arange(4.0))) ** 2)
      >>> x = jnp.zeros((3, 4)); state = tx.init(x)
      >>> for _ in range(200):
      ...     updates, state = jax.jit(tx.update)(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      learning_rate: a number or a schedule.
      rank: of the projection.
      b1: decay of the mean.
      b2: decay of the second moment.
      eps: added to the root.
      update_every: steps between two projections.
      scale: ``alpha``, relative to the step of all other leaves.
      weight_decay: strength of the decoupled weight decay, multiplied by the learning rate.
      mask: a tree of booleans, or a function that gives one, of the leaves that decay.
      **options: the keywords of `scale_by_matrix_lre`.

    Raises:
      ValueError: for a rank, decay, ``eps`` or number of steps out of range.

    Cost: that of `scale_by_matrix_lre`; a matrix ``(a, b)``, ``a <= b``, has ``r a + 2 r b``
    numbers of state.

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    ICML 2024.
    """
    check_least("galore", "scale", scale)
    inner = inners.Adam(b1, b2, eps), inners.Optax(optax.scale(scale), laws=optax.EmptyState())
    return _matrix_recipe(
        learning_rate,
        (bases.SubspaceIteration(_default(rank, 128), beta=0.0), None, inner),
        optax.scale_by_adam(b1, b2, eps),
        weight_decay,
        mask,
        update_every=update_every,
        **options,
    )


@collects
def soap(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    update_every: int = 10,
    largest: int | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP: Adam in the eigenbases of Shampoo's two matrices.

    ``FullMatrix(b2, every=update_every)`` on both sides × ``Adam(b1, b2)``:

    .. math:: X \leftarrow X - \eta\,Q_L\,\mathrm{Adam}(Q_L^T G\,Q_R)\,Q_R^T,\quad
              L \leftarrow b_2 L + (1-b_2) G G^T,\ R \leftarrow b_2 R + (1-b_2) G^T G

    The paper turns the bases by one QR step of power iteration, here they are eigenvectors. Both
    are complete: a direction that no gradient has reached is there for the one that will. What is
    not above four roundings of the gradient's norm counts as zero, or Adam would blow it up. There
    the second moment stays as it is when the bases turn, here it moves as
    ``(C_L∘C_L) V (C_R∘C_R)^T``; the mean moves in both. In both the first step only fills the
    bases; there a step is taken in those of the steps before, here the newest gradient is in them.

    With a ``rank`` the sides are ``SubspaceIteration(rank, b2)``: as many directions of each side
    are kept, and of the gradients only those of the steps that update the bases are averaged. What
    is left of a gradient outside is divided by the running root mean square of its entries, one
    number a matrix, and scaled as Adam's mean would be if all of it were noise, by
    ``sqrt((1 - b1) / (1 + b1))``. All leaves that are no matrices go through Adam.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.soap(0.1)
      >>> loss = lambda x: jnp.sum((x - jnp.outer(jnp.arange(3.0), jnp.arange(4.0))) ** 2)
      >>> x = jnp.zeros((3, 4)); state = tx.init(x)
      >>> for _ in range(300):
      ...     updates, state = jax.jit(tx.update)(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-1)
      True

    Args:
      learning_rate: a number or a schedule.
      rank: directions of each side, ``None`` for all.
      b1: decay of the mean.
      b2: decay of the second moment and of ``L`` and ``R``.
      eps: added to the root.
      update_every: steps from one turn of the bases to the next.
      largest: sides longer than this, by default 10,000, have no basis; matrices of which no side
        has one go through Adam.
      weight_decay: strength of the decoupled weight decay, multiplied by the learning rate.
      mask: a tree of booleans, or a function that gives one, of the leaves that decay.
      **options: the keywords of `scale_by_matrix_lre`.

    Raises:
      ValueError: for a rank, decay, ``eps`` or number of steps out of range.

    Cost: that of `scale_by_matrix_lre`; a matrix ``(a, b)`` has ``2 a² + 2 b² + 2 a b`` numbers of
    state, with a rank ``r (a + b) + 2 r²``.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024.
    """
    # optax.inject_hyperparams traces default numbers, and shapes depend on ``largest``.
    if rank is None:
        # Eigenvalues are not read, so there is nothing to lose by keeping all that can be told.
        side = bases.FullMatrix(b2, every=update_every, eig_tol=0.0)
        options = {"update_every": 1, **options}
    else:
        side = bases.SubspaceIteration(rank, b2)
        quiet = optax.chain(_scale_by_leaf_rms(b2, eps), optax.scale(((1 - b1) / (1 + b1)) ** 0.5))
        options = {"update_every": update_every, "complement": quiet, **options}
    return _matrix_recipe(
        learning_rate,
        (side, side, inners.Adam(b1, b2, eps)),
        optax.scale_by_adam(b1, b2, eps),
        weight_decay,
        mask,
        **{"warmup_steps": 1, "largest": 10_000 if largest is None else largest, **options},
    )


@collects
def polar_soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    update_every: int = 10,
    rms: float = 0.2,
    largest: int | None = None,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP's step made orthogonal as Muon's is: for networks, the best recipe measured here.

    `soap` with Nesterov's momentum, then `orthogonalize`:

    .. math:: X \leftarrow X - \eta\,\rho\,\sqrt{\max(a, b)}\;
              \mathrm{polar}\bigl(Q_L\,\mathrm{NAdam}(Q_L^T G\,Q_R)\,Q_R^T\bigr)

    Muon orthogonalises the momentum as it comes, noise and all; here every pair of eigendirections
    is first divided by the size of its own gradients. Leaves that are no matrices, biases and
    scales, go through Adam.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.polar_soap(optax.linear_schedule(0.5, 0.0, 200))
      >>> loss = lambda x: jnp.sum((x - jnp.outer(jnp.arange(3.0), jnp.arange(4.0))) ** 2)
      >>> x = jnp.zeros((3, 4)); state = tx.init(x); update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      learning_rate: a number or a schedule that falls, as steps do not shrink by themselves.
        Updates have the size of Adam's: start from 1e-2.
      b1: decay of the mean.
      b2: decay of the second moment and of both sides' matrices.
      eps: added to the root.
      update_every: steps from one turn of the bases to the next. 3 was better on deep narrow
        networks, at about twice the time.
      rms: root mean square of a matrix's update at learning rate 1.
      largest: sides longer than this, by default 1024, have no basis (embeddings); matrices of
        which no side has one go through Adam and are then made orthogonal.
      weight_decay: strength of the decoupled weight decay, multiplied by the learning rate.
      mask: a tree of booleans, or a function that gives one, of the leaves that decay.
      **options: the keywords of `scale_by_matrix_lre`.

    Raises:
      ValueError: for a decay, ``eps``, ``rms`` or number of steps out of range.

    Cost: that of `soap` and of `orthogonalize`.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024; Jordan et al.,
    "Muon", 2024.
    """
    side = bases.FullMatrix(b2, every=update_every, eig_tol=0.0)
    laws: Any = optax.ScaleByAdamState(
        SCALAR,  # pyright: ignore[reportArgumentType]
        VECTOR,  # pyright: ignore[reportArgumentType]
        SECOND_MOMENT,  # pyright: ignore[reportArgumentType]
    )
    inner = inners.Optax(optax.scale_by_adam(b1, b2, eps, nesterov=True), laws=laws)
    return _matrix_recipe(
        learning_rate,
        (side, side, inner),
        optax.scale_by_adam(eps=eps),
        weight_decay,
        mask,
        then=orthogonalize(rms, view=options.get("view")),
        **{"warmup_steps": 1, "largest": 1024 if largest is None else largest, **options},
    )


class _LeafRMS(NamedTuple):
    """Of every leaf, ``(n,)`` each: steps that were not zero, the average of the mean square."""

    count: jax.Array
    square: jax.Array


def _scale_by_leaf_rms(decay: float, eps: float) -> optax.GradientTransformation:
    """Divides every leaf by the root of the running average of its entries' mean square."""

    def init(params: Any) -> _LeafRMS:
        n = len(jax.tree.leaves(params))
        return _LeafRMS(jnp.zeros(n, jnp.int32), jnp.zeros(n))

    def update(updates: Any, state: Any, params: Any = None):
        leaves, treedef = jax.tree.flatten(updates)
        mean = jnp.stack([jnp.mean(jnp.square(x)) for x in leaves]).astype(state.square.dtype)
        seen = mean > 0
        count = _linalg.tally(state.count, seen)
        square = jnp.where(seen, decay * state.square + (1 - decay) * mean, state.square)
        whole = square / (1 - jnp.asarray(decay, square.dtype) ** jnp.maximum(count, 1))
        size = jnp.sqrt(whole) + eps
        scaled = [x / c.astype(x.dtype) for x, c in zip(leaves, size, strict=True)]
        return treedef.unflatten(scaled), _LeafRMS(count, square)

    return optax.GradientTransformation(init, update)


def _default(size: int | None, otherwise: int) -> int:
    """A size, which is ``None`` by default: `optax.inject_hyperparams` traces default numbers."""
    return otherwise if size is None else size


def _matrix_recipe(
    learning_rate, parts, others, weight_decay, mask, then=optax.identity(), **options: Any
):
    """`scale_by_matrix_lre`, decoupled weight decay, learning rate."""
    options = {"rest": others, **options}
    return recipe(
        matrix_engine(*parts, **options),
        then,
        _decay_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _decay_weights(strength: Any, mask: Any) -> optax.GradientTransformation:
    """Weight decay as in optax, which asks for params only if there is any to apply."""
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
