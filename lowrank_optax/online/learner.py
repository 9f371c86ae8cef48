"""Learner: an online operator whose subspace is trained for its purposes."""

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
from lowrank_optax.online.loss import composite
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
      operator: the operator as it is now: ``A``, ``H`` and ``A A^T``.
      theta: parameters that the purposes learn besides ``A``, one tree for each purpose.
      memory: the purposes' memories of the stream, one tree for each purpose.
      opt_state: the optimizer's state.
      energy: running average of ``E‖v‖²``, a number.
      previous: the last vector, ``(1, leaf.size)`` a leaf, if a purpose looks at pairs; else
        ``()``.
      after: whether ``previous`` is a vector that was seen, so that the next one follows it.
      count: number of updates that took in something.
      skipped: number of vectors left out because they were not finite.
      failed: number of updates undone because loss or gradient was not finite.
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
      loss: the composite loss before the update, a number.
      values: the purposes' own losses without their weights, in the order of `Learner.purposes`.
      moved: whether ``A`` moved: with an optimizer that collects gradients it rarely does.
      change: the matrix ``C = A_new A_old^+``, ``(r, r)``: codes ``z`` became ``C z``.
    """

    loss: jax.Array
    values: tuple[jax.Array, ...]
    moved: jax.Array
    change: jax.Array


@dataclasses.dataclass(frozen=True)
class Learner:
    """Pure functions ``init``, ``update`` and ``operator``; made by `learner`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> learner = lro.online.learner(2, (lro.online.Entropy(0.1),))
      >>> state = jax.eval_shape(learner.init, jax.random.key(0), jnp.zeros(6))
      >>> print(len(learner.purposes), state.operator.rows.shape, state.operator.h.shape)
      2 (2, 6) (2, 2)

    Args:
      rank: number ``r`` of codes.
      purposes: the purposes, reconstruction first where it has a weight.
      optimizer: the optax transformation that moves ``A``.
      orthonormal: whether ``A`` has orthonormal rows.
      decay: decay ``β`` of the running averages per update.
      relative: whether losses are divided by ``E‖v‖²``.
      dtype: dtype of the stored rows; ``None`` for that of the vectors.

    Cost: that of `learner`.

    Source: that of the purposes.
    """

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
          key: random key for the first ``A`` and for the purposes' own parameters.
          example: a vector or tree of floating-point arrays, or of their shapes; the values are not
            read.
          rows: the first ``A``, leaves ``(r, *shape)``, such as an operator's `eigenvectors`; by
            default random and orthonormal. If ``A`` is to be orthonormal, they are made so.

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
          state: the state before.
          vectors: one vector shaped like the example, or ``k`` of them along a leading axis. With
            ``k = 0`` the state stays as it is and losses are 0.
          next: the vectors that follow each of ``vectors``; by default the next ones in the order
            in which they are passed.
          **extra: the other streams that the purposes ask for, by name; each is shaped like
            ``vectors``, with any number of vectors.

        Returns:
          The state after the update, and `Info`.

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
        # The first vector counts fully, since averages start at zero.
        rate = (1 - self.decay) / (1 - self.decay ** (state.count + 1.0).astype(layout.dtype))
        norms = layout.squares(stream.columns)
        energy = (1 - rate) * state.energy + rate * jnp.sum(stream.weights * norms)
        pairs = self._successors(state, stream, fine, after)
        extra_streams = {name: s for name, (s, _) in others.items()}
        scale = jnp.where(energy > 0, energy, 1) if self.relative else jnp.ones_like(energy)
        view = View(old, stream, old.codes(stream.columns), pairs, extra_streams, scale, ())
        loss, values, steps, opt_state, size, sound = self._descend(state, view)
        ok = some & sound
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
        # `_retract` has left the rows alone where it had to; a choice here would copy them.
        keep = new.operator.rows
        new = jax.tree.map(partial(jnp.where, ok), _sparing(new), _sparing(state))
        new = new._replace(
            operator=dataclasses.replace(new.operator, rows=keep),
            skipped=linalg.tally(state.skipped, sum(jnp.sum(x) for x in lost)),
            failed=linalg.tally(state.failed, some & ~ok),
            # The next vector does not follow one that was not taken in.
            after=ok & fine[-1]
            if on is None
            else jnp.where(jnp.any(on), ok & fine[-1], state.after),
        )
        return new, Info(loss, values, moved, c)

    def _descend(self, state: LearnerState, view: View) -> "_Descent":
        """What the optimizer makes of the composite loss and its gradient."""
        old, dtype = state.operator, state.operator.layout.dtype
        weights = tuple(
            p.weight(state.count) if callable(p.weight) else p.weight for p in self.purposes
        )
        wide = _widened(old.rows, dtype)
        (loss, values), grads = jax.value_and_grad(composite, argnums=(3, 4), has_aux=True)(
            self.purposes, self.orthonormal, weights, wide, state.theta, view, state.memory
        )
        steps, opt_state = self.optimizer.update(grads, state.opt_state, (wide, state.theta))
        size = sum(jnp.sum(jnp.square(x.astype(dtype))) for x in jax.tree.leaves(steps))
        sound = jnp.isfinite(loss) & jnp.isfinite(size) & jnp.isfinite(optax.tree.norm(grads))
        return _Descent(loss, values, steps, opt_state, size, sound)

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
        # A weight of zero is not enough, because the prediction from a huge vector may overflow.
        sources = [jnp.where(both[:, None], c, 0) for c in sources]
        targets = Stream(targets.columns, _mean(both, layout.dtype))
        return Pairs(sources, operator.codes(sources), targets)

    def _retract(self, old: Operator, steps: Columns, moved: jax.Array):
        """Rows moved by a step, their Gram matrix, ``C``, and whether they moved.

        They are made orthonormal again where ``A`` is to be. The work is in a loop that runs only
        if ``moved``.
        """
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


class _Descent(NamedTuple):
    """One step of the optimizer, its squared length, and whether all of it was finite."""

    loss: jax.Array
    values: tuple[jax.Array, ...]
    steps: Any
    opt_state: Any
    size: Any
    sound: jax.Array


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
    r"""Learns ``G = A^T H A`` from a stream of vectors; the subspace is trained for a purpose.

    .. math:: L(A) = w_0\, E‖v - A^T A v‖^2 / E‖v‖^2 + \sum_i w_i L_i(A), \qquad
              H \leftarrow \beta H + (1 - \beta)\, z z^T, \quad z = A v

    Every update takes the gradient of the composite loss in closed form and hands it to an optax
    optimizer, by default a slow one that moves ``A`` once in eight updates. Orthonormal rows get
    gradients tangent to them and are made orthonormal again by ``(A A^T)^{-1/2}``. When ``A``
    moves, so does ``H <- C H C^T`` with ``C = A_new A_old^+``.

    The gradient through ``H`` is that of an average over the whole stream, taken at the average
    before the batch. Differentiating one step of the running average would give ``1 - β`` times
    that, with a bias.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> learner = lro.online.learner(2, (), optax.adam(3e-2))
      >>> state = learner.init(jax.random.key(0), jnp.zeros(6))
      >>> stream = jax.random.normal(jax.random.key(1), (200, 6)) * jnp.array([5., 4, 1, 1, 1, 1])
      >>> state, info = jax.lax.scan(learner.update, state, stream)
      >>> op = learner.operator(state)
      >>> op.encode(stream).shape, bool(info.loss[-50:].mean() < info.loss[:50].mean())
      ((200, 2), True)

    Args:
      rank: number ``r`` of codes, at least 1.
      purposes: what the subspace is for, a sequence of purposes such as `Dynamics`. A function of
        ``(operator, batch)``, or a pair of a weight and such a function, stands for `Custom`.
      optimizer: an optax transformation or `optax.MultiSteps`; default
        ``optax.MultiSteps(optax.adam(1e-2), 8)``.
      reconstruction: weight ``w_0`` of the first term, a number of at least 0 or a schedule;
        default 1. With 0 it is left out.
      orthonormal: whether ``A`` has orthonormal rows; by default yes, unless a purpose needs rows
        of any length.
      decay: decay ``β`` of the running averages per update, in [0, 1), default 0.99.
      relative: whether losses are divided by ``E‖v‖²``, which makes them free of units; default
        yes.
      dtype: dtype of the stored rows, by default that of the vectors. The optimizer works in
        float32 at least.

    Returns:
      A `Learner` with ``init(key, example)``, ``update(state, vectors, **streams)`` and
      ``operator(state)``. Vectors that are not finite are left out and counted; a loss that is not
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
    """A stream whose vectors are set to zero where not finite or not ``on``; which ones remain."""
    fine = jnp.stack([jnp.all(jnp.isfinite(c), axis=1) for c in columns]).all(axis=0)
    fine = fine if on is None else fine & on
    columns = [jnp.where(fine[:, None], c, 0) for c in columns]
    return Stream(columns, _mean(fine, layout.dtype)), fine


def _mean(some: jax.Array, dtype: Any) -> jax.Array:
    """Equal weights with sum one for those that are true."""
    return some.astype(dtype) / jnp.maximum(1, jnp.sum(some))


def _widened(rows: Any, dtype: Any) -> Any:
    """Rows as the optimizer sees them, since an ``eps`` like Adam's would be zero in 16 bits."""
    return jax.tree.map(lambda w: w.astype(dtype), rows)


def _sparing(state: LearnerState) -> LearnerState:
    """The state without the rows, which are large."""
    return state._replace(operator=dataclasses.replace(state.operator, rows=()))
