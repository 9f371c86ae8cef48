"""Learner: the online operator, its subspace trained for its purposes."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_count, check_decay
from lowrank_optax._core.devices import init_on_devices, sharded_like
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.loops import now_and_then
from lowrank_optax._core.precision import full_precision
from lowrank_optax._core.rows import orthonormal, random_rows, rewrite
from lowrank_optax._core.states import check_fits, check_kind
from lowrank_optax._core.types import Columns
from lowrank_optax.online.operator import Operator
from lowrank_optax.online.purposes import (
    Custom,
    Pairs,
    Purpose,
    Reconstruction,
    Stream,
    View,
    Weight,
)


class LearnerState(NamedTuple):
    """State of a `Learner`.

    Attributes:
      operator: ``A``, ``H`` and ``A A^T`` as they are now.
      theta: parameters that purposes learn besides ``A``, for each purpose.
      memory: what purposes remember of the stream, for each purpose.
      opt_state: of the optimizer.
      energy: ``E‖v‖²``, a running average.
      previous: the last vector, ``(1, leaf.size)`` a leaf, where a purpose looks at pairs.
      after: whether ``previous`` is a vector that was seen.
      count: updates that took in something.
      skipped: vectors that were not finite.
      failed: updates undone because loss or gradient was not finite.
    """

    operator: Operator
    theta: tuple[Any, ...]
    memory: tuple[Any, ...]
    opt_state: Any
    energy: jax.Array
    previous: Any
    after: jax.Array
    count: jax.Array
    skipped: jax.Array
    failed: jax.Array


class Info(NamedTuple):
    """What an update reports.

    Attributes:
      loss: the composite loss, before the update.
      values: the purposes' own losses without their weights, reconstruction first.
      moved: whether ``A`` moved: on a slow schedule it rarely does.
      change: ``C = A_new A_old^+``, ``(r, r)``, by which codes moved.
    """

    loss: jax.Array
    values: tuple[jax.Array, ...]
    moved: jax.Array
    change: jax.Array


@dataclasses.dataclass(frozen=True)
class Learner:
    """Pure functions ``init``, ``update`` and ``operator``; made by `learner`."""

    rank: int
    purposes: tuple[Purpose, ...]
    optimizer: Any
    orthonormal: bool
    decay: float
    relative: bool
    dtype: Any

    @full_precision
    def init(self, key: jax.Array, example: Any, rows: Any = None) -> LearnerState:
        """The state before the first vector.

        Args:
          key: for the start of ``A`` and of what else purposes learn.
          example: a vector or tree of floating-point arrays, or their shapes.
          rows: where ``A`` starts, leaves ``(r, *shape)``, such as an operator's `eigenvectors`; by
            default random and orthonormal. They are made orthonormal where ``A`` is to be.

        Raises:
          ValueError: for a rank above the number of entries, or rows of other shapes.
        """
        return init_on_devices(self._init, (key, example, rows))

    def _init(self, given: tuple[jax.Array, Any, Any]) -> LearnerState:
        key, example, rows = given
        layout = Layout.of(example, None, self.dtype, owner="learner.init")
        r, d, dtype = self.rank, sum(layout.sizes), layout.dtype
        check(
            r <= d or not layout.sizes,
            f"learner.init: rank is {r}, but vectors have {d} entries; pass at most {d}.",
        )
        first, *keys = jax.random.split(key, 1 + len(self.purposes))
        rows = random_rows(layout, first, r) if rows is None else self._given(layout, rows)
        gram = layout.gram(rows)[0] if rows else jnp.eye(r, dtype=dtype)
        operator = Operator(layout.tree(rows), jnp.zeros((r, r), dtype), gram, layout)
        theta = tuple(p.theta(k, r, dtype) for p, k in zip(self.purposes, keys, strict=True))
        count = lambda: jnp.zeros((), jnp.int32)
        return LearnerState(
            operator,
            theta,
            tuple(p.memory(r, dtype) for p in self.purposes),
            self.optimizer.init((_widened(operator.rows, dtype), theta)),
            jnp.zeros((), dtype),
            layout.tree(layout.zeros(1)) if self._pairs else (),
            jnp.zeros((), bool),
            count(),
            count(),
            count(),
        )

    def _given(self, layout: Layout, rows: Any) -> Columns:
        columns, many = layout.columns(rows, "learner.init")
        check(
            many and columns[0].shape[0] == self.rank,
            f"learner.init: rows hold {columns[0].shape[0]} vectors; pass {self.rank}.",
        )
        return orthonormal(layout, columns) if self.orthonormal else columns

    def operator(self, state: LearnerState) -> Operator:
        """The operator as it is now."""
        return state.operator

    def update(
        self, state: LearnerState, vectors: Any, *, next: Any = None, **extra: Any
    ) -> tuple[LearnerState, Info]:
        """Takes in one vector, or several along a leading axis.

        Args:
          state: the state.
          vectors: shaped like the example, or with a leading axis ``k``; with ``k = 0`` the state
            stays as it is and losses are 0.
          next: what follows each vector; by default the next one in the order of passing.
          extra: further streams that purposes ask for, shaped like ``vectors``, any number each.

        Raises:
          ValueError: for shapes unlike the example's, or a stream that is missing or not asked for.
        """
        check_kind("learner.update", state, LearnerState)
        example = state.operator.layout.example
        begin = lambda key: self.init(key, example)
        check_fits("learner.update", state, begin, (jax.random.key(0),))
        needed = {name: p for p in self.purposes for name in p.streams}
        for name, purpose in needed.items():
            check(
                name in extra,
                f"{type(purpose).__name__} needs the stream `{name}`, which was not passed: call "
                f"learner.update(state, vectors, {name}=...).",
            )
        unknown = sorted(set(extra) - set(needed))
        check(
            not unknown,
            f"learner.update: no purpose asks for {', '.join(unknown)}; pass "
            f"{', '.join(sorted(needed)) or 'vectors alone'}.",
        )
        return sharded_like(self._update, (state, None), state, vectors, next, extra)

    def _update(self, state: LearnerState, vectors: Any, next: Any, extra: dict[str, Any]):
        layout = state.operator.layout.on(vectors)
        columns = lambda tree: layout.columns(tree, "learner.update")[0]
        stream = columns(vectors)
        after = None if next is None else columns(next)
        check(
            after is None or not stream or after[0].shape == stream[0].shape,
            "learner.update: next holds another number of vectors; pass one for each.",
        )
        others = {name: columns(vectors) for name, vectors in extra.items()}
        if stream and stream[0].shape[0] == 0:
            nothing = jnp.zeros((), layout.dtype)
            same = jnp.eye(self.rank, dtype=layout.dtype)
            return state, Info(nothing, (nothing,) * len(self.purposes), nothing != 0, same)
        return self.step(state, stream, after, others)

    @full_precision
    def step(
        self,
        state: LearnerState,
        columns: Columns,
        after: Columns | None,
        extra: dict[str, Columns],
        on: jax.Array | None = None,
    ) -> tuple[LearnerState, Info]:
        """`update` for vectors given as columns; ``on``, ``(k,)``, says which of them count."""
        old, layout = state.operator, state.operator.layout
        stream, fine = _clean(layout, columns, on)
        others = {name: _clean(layout, c) for name, c in extra.items()}
        lost = [~fine if on is None else on & ~fine, *(~ok for _, ok in others.values())]
        some = jnp.any(fine)
        # An average corrected for its start: the first vector counts fully.
        rate = (1 - self.decay) / (1 - self.decay ** (state.count + 1.0).astype(layout.dtype))
        norms = layout.squares(stream.columns)
        energy = (1 - rate) * state.energy + rate * jnp.sum(stream.weights * norms)
        view = View(
            old,
            stream,
            old.codes(stream.columns),
            self._successors(state, stream, fine, after),
            {name: s for name, (s, _) in others.items()},
            jnp.where(energy > 0, energy, 1) if self.relative else jnp.ones_like(energy),
            (),
        )
        weights = tuple(
            p.weight(state.count) if callable(p.weight) else p.weight for p in self.purposes
        )
        wide = _widened(old.rows, layout.dtype)
        (loss, values), grads = jax.value_and_grad(composite, argnums=(3, 4), has_aux=True)(
            self.purposes, self.orthonormal, weights, wide, state.theta, view, state.memory
        )
        steps, opt_state = self.optimizer.update(grads, state.opt_state, (wide, state.theta))
        size = sum(jnp.sum(jnp.square(x.astype(layout.dtype))) for x in jax.tree.leaves(steps))
        ok = some & jnp.isfinite(loss) & jnp.isfinite(size) & jnp.isfinite(optax.tree.norm(grads))
        memory = tuple(
            p.remember(m, view._replace(memory=m), rate)
            for p, m in zip(self.purposes, state.memory, strict=True)
        )
        h = (1 - rate) * old.h + rate * (view.codes.T * stream.weights[None]) @ view.codes
        rows, gram, c, moved = self._retract(old, layout.leaves(steps[0]), ok & (size > 0))
        new = LearnerState(
            dataclasses.replace(
                old, rows=layout.tree(rows), gram=gram, h=linalg.symmetrize(c @ h @ c.T)
            ),
            jax.tree.map(lambda p, u: (p + u).astype(p.dtype), state.theta, steps[1]),
            tuple(p.move(m, c) for p, m in zip(self.purposes, memory, strict=True)),
            opt_state,
            energy,
            layout.tree([x[-1:] for x in stream.columns]) if self._pairs else (),
            fine[-1],
            linalg.tally(state.count),
            state.skipped,
            state.failed,
        )
        # Rows have been kept already, where they had to be; a choice would copy them.
        keep = new.operator.rows
        new = jax.tree.map(partial(jnp.where, ok), _sparing(new), _sparing(state))
        new = new._replace(
            operator=dataclasses.replace(new.operator, rows=keep),
            skipped=linalg.tally(state.skipped, sum(jnp.sum(x) for x in lost)),
            failed=linalg.tally(state.failed, some & ~ok),
            # What was not taken in is not followed by anything.
            after=ok & fine[-1]
            if on is None
            else jnp.where(jnp.any(on), ok & fine[-1], state.after),
        )
        return new, Info(loss, values, moved, c)

    @property
    def _pairs(self) -> bool:
        return any(p.pairs for p in self.purposes)

    def _successors(
        self, state: LearnerState, stream: Stream, fine: jax.Array, after: Columns | None
    ) -> Pairs | None:
        """Each vector with the one that follows it."""
        if not self._pairs:
            return None
        operator, layout = state.operator, state.operator.layout
        if after is not None:
            targets, known = _clean(layout, after)
            sources, both = stream.columns, fine & known
        else:
            first = layout.leaves(state.previous)
            sources = [
                jnp.concatenate([p, c[:-1]]) for p, c in zip(first, stream.columns, strict=True)
            ]
            both = fine & jnp.concatenate([state.after[None], fine[:-1]])
            targets = stream
        # A weight of zero is not enough: what is predicted from a huge vector may overflow.
        sources = [jnp.where(both[:, None], c, 0) for c in sources]
        targets = Stream(targets.columns, _mean(both, layout.dtype))
        return Pairs(sources, operator.codes(sources), targets)

    def _retract(self, old: Operator, steps: Columns, moved: jax.Array):
        """Rows moved by a step, orthonormal again if they are to be, and ``C``; rarely run."""
        rows, r = old.layout.leaves(old.rows), self.rank
        layout = old.layout.on(rows)
        eye = jnp.eye(r, dtype=old.h.dtype)

        def body(_, carry):
            rows, gram, c = carry
            cross = layout.dot(rows, steps)[0]
            t = eye
            if self.orthonormal:
                s = gram + cross + cross.T + layout.gram(steps)[0]
                t = linalg.matrix_power(s, -0.5, damping=0, rdamping=0)
            turn = lambda _, at, block, step: (
                t @ (block.astype(layout.dtype) + step.astype(layout.dtype))
            )
            always = jnp.ones(1, bool)
            rows, new, back = rewrite(rows, layout, always, r, turn, steps, cross=True)
            c = (
                back[0]
                if self.orthonormal
                else back[0] @ linalg.matrix_power(gram, -1.0, damping=0, rdamping=0)
            )
            return rows, new[0], c

        rows, gram, c = now_and_then(moved, body, (rows, old.gram, eye))
        return rows, gram, c, moved


def learner(
    rank: int,
    purposes: Sequence[Any] = (),
    optimizer: Any = None,
    *,
    reconstruction: Weight = 1.0,
    orthonormal: bool | None = None,
    decay: float = 0.99,
    relative: bool = True,
    dtype: Any = None,
) -> Learner:
    r"""Learns ``G = A^T H A`` from a stream of vectors, its subspace for a purpose.

    .. math:: L(A) = w_0\, E‖v - A^T A v‖^2 / E‖v‖^2 + \sum_i w_i L_i(A), \qquad
              H \leftarrow \beta H + (1 - \beta)\, z z^T, \quad z = A v

    Every update takes the gradient of the composite loss in closed form and hands it to an optax
    optimizer, by default a slow one that moves ``A`` once in eight updates. Orthonormal rows get
    gradients tangent to them and are made orthonormal again by ``(A A^T)^{-1/2}``. With ``A`` moves
    ``H <- C H C^T`` with ``C = A_new A_old^+``. The gradient through ``H`` is taken at the average
    before the batch, as that of an average over the whole stream: differentiating one step of the
    running average instead gives ``1 - β`` times it, with a bias.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> learner = lro.online.learner(2, (lro.online.Dynamics(1.0),), optax.adam(3e-2))
      >>> state = learner.init(jax.random.key(0), jnp.zeros(6))
      >>> stream = jax.random.normal(jax.random.key(1), (200, 6)) * jnp.array([5., 4, 1, 1, 1, 1])
      >>> state, info = jax.lax.scan(learner.update, state, stream)
      >>> op = learner.operator(state)
      >>> op.encode(stream).shape, bool(info.loss[-50:].mean() < info.loss[:50].mean())
      ((200, 2), True)

    Args:
      rank: number of codes, ``r``.
      purposes: what the subspace is for, see the classes of `lowrank_optax.online`; a function of
        ``(operator, batch)``, or a pair of a weight and one, is a purpose too, see `Custom`.
      optimizer: any optax transformation or `optax.MultiSteps`; by default
        ``optax.MultiSteps(optax.adam(1e-2), 8)``.
      reconstruction: weight of the first term, a number or a schedule; 0 leaves it out.
      orthonormal: whether ``A`` has orthonormal rows; by default it has unless a purpose needs free
        ones.
      decay: ``β`` of the running averages, per update.
      relative: whether losses are divided by ``E‖v‖²`` and so free of units.
      dtype: of the stored rows, by default the vectors'. The optimizer works in float32 at least.

    Returns:
      An object with ``init(key, example)``, ``update(state, vectors, **streams)`` and
      ``operator(state)``. Vectors that are not finite are skipped and counted; a loss that is not
      finite leaves everything as it was.

    Raises:
      ValueError: for values out of range, `Whitening` with orthonormal rows, or nothing to learn.

    Cost: memory ``2 r d`` and the optimizer's; an update ``12 k r d`` flops and more by purpose,
    and ``8 r² d`` when ``A`` moves.
    """
    check_count("learner", "rank", rank)
    check_decay("learner", "decay", decay)
    given = tuple(_purpose(p) for p in purposes)
    parts = (Reconstruction(reconstruction), *given) if _nonzero(reconstruction) else given
    check(parts, "learner: no purposes and no reconstruction; pass at least one of them.")
    free = [type(p).__name__ for p in parts if p.free]
    if orthonormal is None:
        orthonormal = not free
    check(
        not (orthonormal and free),
        f"learner: {', '.join(free)} needs rows of any length, but orthonormal is True: with "
        "orthonormal rows codes become alike only by leaving the leading directions. Pass "
        "orthonormal=False, or whiten by operator.power(v, -0.5).",
    )
    if optimizer is None:
        optimizer = optax.MultiSteps(optax.adam(1e-2), 8)
    check(
        hasattr(optimizer, "init") and hasattr(optimizer, "update"),
        f"learner: optimizer is {optimizer!r}; pass an optax transformation or optax.MultiSteps.",
    )
    return Learner(rank, parts, optimizer, orthonormal, decay, relative, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def composite(
    purposes: tuple[Purpose, ...],
    tangent: bool,
    weights: tuple[Any, ...],
    rows: Any,
    theta: tuple[Any, ...],
    view: View,
    memory: tuple[Any, ...],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """``sum_i w_i L_i`` and the ``L_i``; its gradient is put together from factors.

    The backward pass needs rows, vectors, codes and moments, nothing else. With ``tangent`` the
    gradient is that on orthonormal rows, ``∂A - ∂A A^T A`` (a dense one's: ``∂A - sym(∂A A^T) A``).
    """
    return _values(purposes, weights, rows, theta, view, memory)[:2]


def _values(purposes, weights, rows, theta, view, memory):
    view = view._replace(operator=dataclasses.replace(view.operator, rows=rows))
    terms = [
        p.terms(view._replace(memory=m), t) for p, m, t in zip(purposes, memory, theta, strict=True)
    ]
    values = tuple(t.value for t in terms)
    total = jnp.stack([w * v for w, v in zip(weights, values, strict=True)]).sum()
    return total, values, terms


def _forward(purposes, tangent, weights, rows, theta, view, memory):
    out = _values(purposes, weights, rows, theta, view, memory)[:2]
    return out, (weights, rows, theta, view, memory)


def _backward(purposes, tangent, saved, cotangents):
    weights, rows, theta, view, memory = saved
    terms = _values(purposes, weights, rows, theta, view, memory)[2]
    bars = [cotangents[0] * w + v for w, v in zip(weights, cotangents[1], strict=True)]
    layout, leaves = view.operator.layout, view.operator.layout.leaves(rows)
    total = [jnp.zeros(w.shape, layout.dtype) for w in leaves]
    factors = [
        (b * t.left, t.right, t.inside)
        for b, t in zip(bars, terms, strict=True)
        if t.left is not None
    ]
    if factors:
        left, inside = (jnp.concatenate([f[i] for f in factors]) for i in (0, 2))
        right = [jnp.concatenate(c) for c in zip(*(f[1] for f in factors), strict=True)]
        total = _outer(layout, left, right, inside if tangent else None, leaves)
    dense = [(b, t.dense) for b, t in zip(bars, terms, strict=True) if t.dense is not None]
    for bar, gradient in dense:
        if tangent:
            within = layout.combine(
                linalg.symmetrize(layout.dot(gradient, leaves)[0])[None], leaves
            )
            gradient = [g.astype(i.dtype) - i for g, i in zip(gradient, within, strict=True)]
        total = [x + bar * g.astype(x.dtype) for x, g in zip(total, gradient, strict=True)]
    out = [x.astype(w.dtype) for x, w in zip(total, leaves, strict=True)]
    bar_theta = tuple(
        jax.tree.map(lambda x, b=b: b * x, t.theta) for b, t in zip(bars, terms, strict=True)
    )
    return None, layout.tree(out), bar_theta, None, None


composite.defvjp(_forward, _backward)


def _outer(layout, left, right, inside, rows) -> Columns:
    """``sum_j a_j b_j^T``, of the ``b_j`` less ``A^T A b_j`` where their codes are given."""
    if inside is None:
        return layout.combine(left.T[None], right)
    if left.shape[0] < left.shape[1]:  # few vectors are projected at less than their sum
        within = layout.combine(inside[None], rows)
        right = [b.astype(i.dtype) - i for b, i in zip(right, within, strict=True)]
        return layout.combine(left.T[None], right)
    total = layout.combine(left.T[None], right)
    within = layout.combine((left.T @ inside)[None], rows)
    return [g - i for g, i in zip(total, within, strict=True)]


def _purpose(p: Any) -> Purpose:
    if isinstance(p, Purpose):
        return p
    weight, function = p if isinstance(p, tuple) and len(p) == 2 else (1.0, p)
    check(
        callable(function),
        f"learner: {p!r} is not a purpose; pass one of lro.online's, a function of (operator, "
        "batch), or a pair (weight, function).",
    )
    return Custom(weight, function)


def _nonzero(weight: Any) -> bool:
    return callable(weight) or isinstance(weight, jax.Array) or weight != 0


def _clean(
    layout: Layout, columns: Columns, on: jax.Array | None = None
) -> tuple[Stream, jax.Array]:
    """A stream with vectors that are not finite, or not ``on``, set to zero; and which remain."""
    fine = jnp.stack([jnp.all(jnp.isfinite(c), axis=1) for c in columns]).all(axis=0)
    fine = fine if on is None else fine & on
    columns = [jnp.where(fine[:, None], c, 0) for c in columns]
    return Stream(columns, _mean(fine, layout.dtype)), fine


def _mean(some: jax.Array, dtype: Any) -> jax.Array:
    return some.astype(dtype) / jnp.maximum(1, jnp.sum(some))


def _widened(rows: Any, dtype: Any) -> Any:
    """Rows as the optimizer sees them: an ``eps`` like Adam's is zero in 16 bits."""
    return jax.tree.map(lambda w: w.astype(dtype), rows)


def _sparing(state: LearnerState) -> LearnerState:
    return state._replace(operator=dataclasses.replace(state.operator, rows=()))
