"""Parameters as matrices: a leaf is a block of columns with a basis for one side or for both.

The inner parts see ``U = Q_S^T G Q_L``, flattened. Their states move with the Kronecker product
``C_S (x) C_L``, which nobody forms.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import jax
import optax

from lowrank_optax._core.checks import as_size, check
from lowrank_optax._core.types import (
    NEEDS,
    Inner,
    Law,
)
from lowrank_optax.basis import Basis, FullMatrix
from lowrank_optax.curvature.sides import SideCovariance, SideCurvature
from lowrank_optax.engine.leaves import MatricesEngine
from lowrank_optax.engine.matrix_space import MatrixParts, MatrixSpace
from lowrank_optax.engine.stacks import Matrices
from lowrank_optax.engine.views import View

OWNER = "scale_by_matrix_lre"


def scale_by_matrix_lre(
    short: Basis | None,
    long: Basis | None,
    inner: Inner | Sequence[Inner],
    *,
    curvature: SideCurvature = SideCovariance(),
    update_every: int | Callable[[jax.Array], jax.Array] = 1,
    warmup_steps: int = 0,
    groups: Callable[[Any], Hashable] | None = None,
    view: View | None = None,
    rest: optax.GradientTransformation | None = None,
    complement: float | jax.Array | optax.GradientTransformation | None = None,
    largest: int | None = None,
    dtype: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` in eigenbases of the two sides of every matrix-shaped leaf.

    With ``G`` seen so that its columns are not longer than its rows, ``(a, b)``, ``a <= b``:

    .. math:: \Delta = Q_S\,\mathrm{inner}(Q_S^T G\, Q_L;\ \sqrt{\lambda_S \lambda_L})\,Q_L^T
              + \gamma\,(G - Q_S Q_S^T G\, Q_L Q_L^T)

    ``S`` stands for the shorter side and ``L`` for the longer one. The ``short`` basis learns from
    the ``b`` columns of ``G``, that is ``A = G G^T``, the ``long`` one from its ``a`` rows, ``B =
    G^T G``. ``None`` in place of a basis is the identity; ``lam`` are then the other's eigenvalues.
    With two bases they are those of ``(A (x) B)^{1/2}``, so that `LInvSqrt` gives Shampoo's
    ``A^{-1/4} G B^{-1/4}``. Norms in the inner parts go over the whole
    matrix; their states move as ``(C_S^p) V (C_L^p)^T`` when the bases do.

    ================================ =========== ===============================
    short, long                      inner       is, but for what its recipe says
    ================================ =========== ===============================
    SubspaceIteration(r, 0), None    Adam        GaLore (`galore`)
    FullMatrix(b2) twice             Adam        SOAP (`soap`)
    FullMatrix(None) twice           LInvSqrt    Shampoo
    ================================ =========== ===============================

    Like every ``scale_by_...`` of optax it returns a direction of ascent. A matrix whose gradient
    is zero or not finite gets a zero update, its state stays as it was, and the step is counted in
    its ``events``; others go on. A side whose eigenproblem fails stays as it was, and the matrix
    takes no step.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> side = lro.basis.SubspaceIteration(2)
      >>> tx = optax.chain(
      ...     lro.scale_by_matrix_lre(side, None, lro.inner.Adam()), optax.scale(-0.1))
      >>> target = jnp.outer(jnp.arange(4.0), jnp.ones(6))
      >>> loss = lambda p: jnp.sum((p["w"] - target) ** 2) + p["b"] ** 2
      >>> p = {"w": jnp.zeros((4, 6)), "b": jnp.ones(())}; state = tx.init(p)
      >>> for _ in range(100):
      ...     updates, state = jax.jit(tx.update)(jax.grad(loss)(p), state)
      ...     p = optax.apply_updates(p, updates)
      >>> bool(loss(p) < 1e-2)
      True

    Args:
      short: basis of the shorter side, from `lowrank_optax.basis`, its rank cut to ``a``. The
        shorter side of a square view is its first axis.
      long: basis of the longer side, cut to ``b``.
      inner: what runs inside: one part or a sequence of them. A matrix has ``r_S r_L`` coordinates,
        so parts that hold matrices or tensors over the coordinates are refused.
      curvature: what the bases learn from, by default the gradient's covariance on both sides.
      update_every: steps between two updates of the bases, or a schedule of the number of steps
        taken. The first step always updates. Only the gradients of those steps are seen;
        ``FullMatrix(update_every=10)`` sees all and turns at every tenth.
      warmup_steps: number of first steps that build the bases and return zeros for the matrices.
        In two bases of full rank that have seen one gradient only, that gradient is diagonal; its
        other coordinates are rounding errors, which Adam would blow up.
      groups: a function of a leaf's path to a label; matrices of one shape that share a label
        share their bases and are one problem: they are dropped or taken together. By default every
        matrix has its own. Of leaves with a batch of as many matrices the first ones share theirs,
        the second ones, and so on: the layers of a scan do not mix.
      view: a function of a leaf's path and shape to the `MatrixAxes` it is seen by, or ``None`` to
        leave it to ``rest``; by default `default_matrix_view`, and `diagnose.views` shows what it
        gives. Matrices of a batch have their own bases and counters each, as if every one of them
        were a leaf.
      rest: optax transformation for the leaves that are not seen as matrices, by default
        `optax.scale_by_adam`. It sees them in float32 at least.
      complement: what becomes of ``G - Q_S Q_S^T G Q_L Q_L^T``: dropped (``None``), scaled by a
        number ``gamma``, or passed through an optax transformation, which sees whole leaves.
      largest: sides longer than this have no basis, and matrices of which no side has one are left
        to ``rest``; ``None`` for no limit. What a full basis costs grows with the cube.
      dtype: dtype of the stored rows, by default the leaf's, for bases that store rows in that.
      seed: seed of the bases' random draws.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state `ScaleByMatrixLREState`; extra
      arguments go to ``rest`` and to the complement.

    Raises:
      ValueError: for parts that do not fit together, arguments out of range, leaves that are not
        floating point, views that are not axes of the leaf, and gradients whose shapes are not
        those of ``init``.

    Cost: a step ``4 (r_S a b + r_S r_L b)`` flops a matrix; an update that of the bases for ``b``
    and ``a`` columns and ``4 r_S r_L (r_S + r_L)`` flops for each state of the inner parts. Leaves
    of one shape are treated together, batched over the small algebra. On several devices
    the state's arrays are dealt out matrix by matrix as far as their number is divisible, otherwise
    split along their last axis; the rest is XLA's partitioning, which moves a few times ``d``.

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    ICML 2024; Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024; Gupta, Koren
    and Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", ICML 2018.
    """
    return MatrixEngine(
        short=short,
        long=long,
        inner=inner,
        curvature=curvature,
        update_every=update_every,
        warmup_steps=warmup_steps,
        groups=groups,
        view=view,
        rest=rest,
        complement=complement,
        largest=largest,
        dtype=dtype,
        seed=seed,
    ).transformation


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MatrixEngine(MatricesEngine):
    """The engine of `scale_by_matrix_lre`."""

    owner: ClassVar[str] = OWNER
    space: ClassVar[type[Matrices]] = MatrixSpace

    short: Basis | None
    long: Basis | None
    curvature: SideCurvature = SideCovariance()
    largest: int | None = None

    def __post_init__(self):
        sides = tuple(basis for basis in (self.short, self.long) if basis is not None)
        check(sides, f"{OWNER}: short and long are None; pass a basis for one side at least.")
        for basis in sides:
            check(
                isinstance(basis, Basis),
                f"{OWNER}: {basis!r} is no basis; pass a part from lowrank_optax.basis, such as "
                "SubspaceIteration(16), or None.",
            )
        check(
            isinstance(self.curvature, SideCurvature),
            f"{OWNER}: curvature is {self.curvature!r}; pass one for sides of matrices, such as "
            "lowrank_optax.curvature.SideCovariance().",
        )
        super().__post_init__()
        _check_parts(sides, self.inner)
        if self.largest is not None:
            object.__setattr__(self, "largest", as_size(OWNER, "largest", self.largest))

    @property
    def parts(self) -> MatrixParts:
        """What the step of a matrix is made of."""
        return MatrixParts(
            self.short, self.long, self.inner, self.curvature, self.largest, self.dtype
        )

    @property
    def every_step(self) -> bool:
        bases = [b for b in (self.short, self.long) if b is not None]
        lazy = [isinstance(b, FullMatrix) and not b.every_step for b in bases]
        return super().every_step and not all(lazy)

    def _fits(self, a: int, b: int) -> bool:
        """Whether a matrix has a side that may have a basis."""
        bound = math.inf if self.largest is None else self.largest
        sides = zip((self.short, self.long), (a, b), strict=True)
        return any(basis is not None and size <= bound for basis, size in sides)


def _check_parts(bases: Sequence[Basis], inner: Inner) -> None:
    """Refuses parts whose needs nothing here meets, and states too large to move."""
    offers = frozenset.intersection(*(basis.provides for basis in bases))
    for owner, needs in (
        (inner, getattr(inner, "needs", frozenset())),
        *((b, b.needs) for b in bases),
    ):
        for name in sorted(needs - offers):
            raise ValueError(f"{OWNER}: {owner} needs {NEEDS[name]}. It was combined with {bases}.")
    laws = jax.tree.leaves(inner.laws, is_leaf=lambda x: isinstance(x, Law))
    check(
        all(law.axes < 2 for law in laws),
        f"{OWNER}: {inner} holds matrices over all r_S r_L coordinates of a matrix; pass "
        "elementwise parts such as lro.inner.Adam(), or see leaves as vectors with scale_by_lre.",
    )
