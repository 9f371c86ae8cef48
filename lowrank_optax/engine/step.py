"""The guarded step: what every step does, however the parameters are seen.

    1 accept      a gradient that is zero or not finite goes no further
    2 absorb      where it is due, the basis takes in what the curvature measured
    3 carry       the inner state moves along, by ``C = Q_new^T Q_old``
    4 inner       the inner parts turn ``Q^T g`` into ``u``
    5 unproject   ``Q u``, and what becomes of ``g - Q Q^T g``
    6 count       steps, failures by reason, metrics

A `Space` says how ``n`` independent problems of one form do each of these: groups of vectors with a
basis each (`engine.vectors`), or matrices of one shape with a basis for one side or both
(`engine.matrices`). Whatever fails leaves basis and inner state as they were, problem by problem.
"""

import abc
import dataclasses
import numbers
from functools import cached_property, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_count, check_least
from lowrank_optax._core.derivatives import undifferentiated
from lowrank_optax._core.devices import Step, init_on_devices, step_on_devices
from lowrank_optax._core.entry import own_arguments
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.loops import in_one_place, now_and_then, traced_once
from lowrank_optax._core.precision import callers_precision, full_precision
from lowrank_optax._core.states import advance_where_taken, check_fits, check_kind
from lowrank_optax._core.types import Context
from lowrank_optax.engine.space import (
    Events,
    Given,
    GroupState,
    Metrics,
    Seen,
    Space,
    Turned,
    only,
    step_inside,
)
from lowrank_optax.inner import as_inner


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Engine(abc.ABC):
    """The parts of one optimizer, and the step they make together.

    A subclass says which spaces a tree has and where its state keeps them.
    """

    inner: Any
    update_every: Any = 1
    warmup_steps: Any = 0
    complement: Any = None
    groups: Any = None
    dtype: Any = None
    seed: Any = 0

    def __post_init__(self):
        owner = self.owner
        fix = lambda name, value: object.__setattr__(self, name, value)
        fix("inner", as_inner(self.inner))
        if not callable(self.update_every):
            check_count(owner, "update_every", self.update_every)
        check_count(owner, "warmup_steps", self.warmup_steps, 0)
        check(
            self.groups is None or callable(self.groups),
            f"{owner}: groups is {self.groups!r}; pass a function "
            "of a leaf's path, such as lowrank_optax.per_leaf.",
        )
        check(
            self.dtype is None or jnp.issubdtype(self.dtype, jnp.floating),
            f"{owner}: dtype is {self.dtype!r}; pass a floating-point dtype such as jnp.bfloat16.",
        )
        if isinstance(self.complement, int | float):
            check_least(owner, "complement", self.complement)
            if self.complement == 0:  # the same thing, at no cost
                fix("complement", None)
        numbers_or_rules = (jax.Array, np.ndarray, np.generic, int, float, *self.rules)
        check(
            self.complement is None or isinstance(self.complement, numbers_or_rules),
            f"{owner}: complement is {self.complement!r}; pass a number, an optax transformation"
            f"{self.further}.",
        )
        fix("told", self._listens(self.complement))
        fix("complement", self._called(self.complement))

    @staticmethod
    def _listens(*transformations: Any) -> bool:
        """Whether a transformation of the user's takes extra arguments."""
        kind = optax.GradientTransformationExtraArgs
        return any(isinstance(tx, kind) for tx in transformations)

    @staticmethod
    def _called(tx: Any) -> Any:
        """A user's transformation with extra arguments, in the precision of its caller."""
        if not isinstance(tx, optax.GradientTransformation):
            return tx
        tx = optax.with_extra_args_support(tx)
        return tx._replace(update=callers_precision(tx.update))

    owner: ClassVar[str]
    """The engine's public name, for messages."""

    kind: ClassVar[type]
    """The class of its state."""

    rules: ClassVar[tuple[type, ...]] = (optax.GradientTransformation,)
    """What a complement may be besides a number."""

    further: ClassVar[str] = ""
    """The same of what is no optax transformation, for messages."""

    told: bool = dataclasses.field(init=False)
    """Whether a transformation of the user's takes extra arguments."""

    @property
    def every_step(self) -> bool:
        """Whether it is known before tracing that each step updates the basis."""
        return isinstance(self.update_every, numbers.Integral) and self.update_every == 1

    @abc.abstractmethod
    def layout(self, updates: Any, state: Any, params: Any) -> Layout:
        """The layout that ``init`` saw."""

    @abc.abstractmethod
    def _init(self, params: Any) -> Any: ...

    @abc.abstractmethod
    def spaces(self, layout: Layout, state: Any) -> dict[str, Space]:
        """The tree's problems by form."""

    @abc.abstractmethod
    def states(self, state: Any) -> dict[str, GroupState]:
        """Their states."""

    @abc.abstractmethod
    def stored(self, state: Any, new: dict[str, GroupState]) -> Any:
        """The inverse of `states`."""

    def factor(self, now: Turned) -> Any:
        """What multiplies the gradient outside the basis: a number, or one for each problem."""
        return self.complement

    def others(self, layout, spaces, updates, state, given) -> tuple[dict, dict, Any]:
        """Updates and flags of leaves that are in no space, by place; and the state after them."""
        return {}, {}, state

    def asked(self, extra: dict[str, Any]) -> dict[str, Any]:
        """The extra arguments that somebody reads: others would keep a step from compiling."""
        return extra

    @property
    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer; its `update` is this engine's own method, by which `recipe` finds it."""
        return optax.GradientTransformationExtraArgs(self.init, self.update)

    # Entry --------------------------------------------------------------------------------------

    @full_precision
    def init(self, params: Any) -> Any:
        return init_on_devices(self._init, params)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any):
        return self.step(updates, state, params, extra)[:2]

    @full_precision
    def step(self, updates: Any, state: Any, params: Any, extra: dict[str, Any]):
        """Updates, state, and which leaves were dropped for something that is not finite."""
        updates = undifferentiated(self.owner, updates)
        params, extra = own_arguments(self.owner, updates, params, extra)
        check_kind(self.owner, state, self.kind)
        layout = self.layout(updates, state, params)
        if not layout.names:
            return updates, state._replace(count=linalg.tally(state.count)), []
        # States of a user's own transformations may be anything.
        theirs = ("complement", "rest")
        check_fits(self.owner, state, self.init, (layout.example,), self._checked, but=theirs)
        return step_on_devices(self._step, updates, state, params, self.asked(extra))

    @cached_property
    def _step(self) -> Step:
        return Step(self._update)

    @cached_property
    def _checked(self) -> set[Any]:
        return set()

    # The step -----------------------------------------------------------------------------------

    def _update(self, updates: Any, state: Any, params: Any, arrays: Any, **functions: Any):
        layout = self.layout(updates, state, params)
        spaces, states = self.spaces(layout, state), self.states(state)
        given = Given(params, arrays | functions, self._key(state, states))
        leaves, dropped, state = self.others(layout, spaces, updates, state, given)

        # 1 accept, then 2 absorb and 3 carry where a basis is due.
        seen = {
            name: self._accept(space, layout.leaves(updates), states[name], given)
            for name, space in spaces.items()
        }
        turned, coordinates = self._absorb(spaces, seen, states)

        # 4 inner, 5 unproject, 6 count.
        new, found = {}, {}
        for name, space in spaces.items():
            found[name], new[name] = self._finish(
                space, seen[name], turned[name], coordinates.get(name), states[name]
            )

        def written(found: Any) -> tuple[dict, ...]:
            """By place: steps, what is left for the complement, what moved, what was dropped."""
            each = {}, {}, {}, {}
            for name, (moves, left, on, bad) in found.items():
                space = spaces[name]
                beyond = {} if left is None else space.write(left)
                parts = space.write(moves), beyond, space.at(on), space.at(bad)
                for all_of_them, one in zip(each, parts, strict=True):
                    all_of_them |= one
            return each

        cut = layout.mesh is None and any(space.cuts for space in spaces.values())
        own, apart, active, bad = (
            in_one_place(written, found, state.count) if cut else written(found)
        )
        for name, (moves, left, *_) in found.items():
            own |= spaces[name].whole(moves)
            apart |= {} if left is None else spaces[name].whole(left)
        leaves, dropped = leaves | own, dropped | bad
        leaves, rest = self._beyond(layout, leaves, apart, active, state.complement, given)
        state = self.stored(state, new)._replace(count=linalg.tally(state.count), complement=rest)
        order = range(len(layout.names))
        updates = layout.shaped([leaves[i] for i in order], updates)
        return updates, state, [dropped[i] for i in order]

    def _accept(self, space: Space, leaves: Any, old: GroupState, given: Given) -> Seen:
        """Phase 1, and what of phase 2 is done at every step."""
        g = space.read(leaves)
        square = space.square(g)
        accept = jnp.isfinite(square) & (square > 0)
        due = accept & ((old.since + 1 >= self._period(old)) | (old.steps == 0))
        return space.look(g, square, accept, due, old, given)

    def _absorb(self, spaces, seen, states) -> tuple[dict[str, Any], dict[str, Any]]:
        """Phases 2 and 3 of all spaces, in one loop that mostly does not run.

        An accelerator has to wait for each such loop, to know whether it runs.
        """
        if not spaces:
            return {}, {}
        if self.every_step:
            both = {
                name: space.absorb(seen[name], space.still(seen[name], states[name]))
                for name, space in spaces.items()
            }
            first, second = ({name: x[i] for name, x in both.items()} for i in range(2))
            return first, second
        still = {name: space.still(seen[name], states[name]) for name, space in spaces.items()}
        turn, after = traced_once(
            lambda now: {
                name: space.absorb(seen[name], now[name])[0] for name, space in spaces.items()
            },
            still,
        )
        # A loop's carry is of one form: zeros in place of what a correction would tell.
        zeros = lambda told: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), told)
        start = {name: x._replace(told=zeros(after[name].told)) for name, x in still.items()}
        silent = lambda now: {name: x._replace(told=still[name].told) for name, x in now.items()}
        some = jnp.any(jnp.concatenate([x.turning for x in seen.values()]))
        return now_and_then(some, lambda _, now: turn(silent(now)), start), {}

    def _finish(self, space: Space, seen: Seen, now: Turned, u0: Any, old: GroupState):
        """Phases 4 to 6 of one space: what it found, and the state.

        Found are the step, what is left outside the basis for an optax transformation, which
        problems moved, and which were dropped for something that is not finite.
        """
        failed = now.failed | seen.broken
        accept, warm = seen.accept & ~failed, old.steps >= self.warmup_steps
        # A step that failed counts, so that the next one tries again. Should that fail too, it was
        # not this step's gradient: the curvature then forgets what it had collected before.
        waited = linalg.tally(old.since, accept | failed)
        now = space.settle(seen, now, old, failed & (waited > self._period(old)))

        # 4 inner: the gradient in the basis, and what the parts make of it.
        g, square = space.follow(seen, now)
        # Coordinates that phase 2 had for nothing are those of the gradient as it came.
        if u0 is None or g is not seen.g:
            u0 = space.project(now.basis, g)
        u0 = jnp.where(accept[:, None], u0, 0)
        moved = seen.due & ~failed
        context = Context(u0, space.eigenbasis(now.basis), moved, *now.told)
        step = jax.vmap(partial(step_inside, self.inner))
        u, inside, fine = step(u0, now.inner, context, accept & warm)
        taken = accept & fine

        # 5 unproject.
        moves, left = self._unproject(space, now, g, u, u0, taken & warm)

        # 6 count.
        failures = Events(~jnp.isfinite(seen.square), seen.square == 0, failed, accept & ~fine)
        captured, cosine = space.shares(u0, u, square)
        metrics = Metrics(captured, now.drift, cosine)
        new = GroupState(
            steps=linalg.tally(old.steps, taken, linalg.DRAWS),
            since=jnp.where(moved, 0, linalg.tally(old.since, taken | failed)),
            curvature=now.curvature,
            basis=now.basis,
            inner=inside,
            events=jax.tree.map(linalg.tally, old.events, failures),
            metrics=jax.tree.map(partial(jnp.where, taken), metrics, old.metrics),
        )
        bad = failures.nonfinite | failures.eigh | failures.inner
        return (moves, left, taken & warm, bad), new

    def _unproject(self, space: Any, now: Turned, g: Any, u: Any, u0: Any, active: jax.Array):
        """``Q u`` plus what becomes of ``g - Q Q^T g``, or that part for a transformation."""
        complement = self.complement
        if complement is None:
            return space.unproject(now.basis, u)[0], None
        clean = lambda on, x: jnp.where(on, x.astype(space.dtype), 0)
        g = jax.tree.map(clean, space.each(active), g)
        u0 = jnp.where(active[:, None], u0, 0)
        if isinstance(complement, optax.GradientTransformation):
            moves, inside = space.unproject(now.basis, u, u0)
            return moves, jax.tree.map(jnp.subtract, g, inside)
        scale = jnp.broadcast_to(jnp.asarray(self.factor(now), space.dtype), active.shape)
        (moves,) = space.unproject(now.basis, u - scale[:, None] * u0)  # no pass of its own
        return jax.tree.map(lambda m, s, x: m + s * x, moves, space.each(scale), g), None

    def _beyond(self, layout, leaves, apart, active, old, given):
        """The leaves with what an optax transformation makes of the part outside the bases."""
        tx = self.complement
        if not isinstance(tx, optax.GradientTransformation) or not apart:
            return leaves, old
        hidden = optax.MaskedNode()
        places = range(len(layout.names))
        outside = layout.tree(
            [jnp.reshape(apart[i], layout.shapes[i]) if i in apart else hidden for i in places]
        )
        params = None if given.params is None else only(layout, apart, given.params)
        step, new = tx.update(outside, old, params, **given.extra)
        on = [active[i] if i in apart else hidden for i in places]
        step = layout.leaves(step)
        take = lambda i: jnp.where(active[i], jnp.reshape(step[i], layout.shapes[i]), 0)
        added = {i: leaves[i] + jnp.reshape(take(i), -1) for i in apart}
        return leaves | added, advance_where_taken(tx, layout, on, new, old)

    def _period(self, old: GroupState) -> Any:
        """Steps between two updates of the basis, as they are now."""
        every = self.update_every
        return every(old.steps) if callable(every) else every

    def _key(self, state: Any, states: dict[str, GroupState]) -> jax.Array:
        """A random key of this step; a step that nobody took draws the same again."""
        steps = [jnp.max(each.steps) for each in states.values()]
        step = jnp.max(jnp.stack(steps)) if steps else state.count
        return jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
