"""The leaves of a tree as stacks of matrices, and an optimizer of their own for all others."""

import abc
import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check
from lowrank_optax._core.layout import Layout
from lowrank_optax.engine.space import (
    Given,
    GroupState,
    Space,
    only,
)
from lowrank_optax.engine.stacks import Matrices, share_out
from lowrank_optax.engine.step import Engine
from lowrank_optax.engine.views import View, see


class ScaleByMatrixLREState(NamedTuple):
    """State of `scale_by_matrix_lre` and `scale_by_kronecker`.

    Attributes:
      count: calls of ``update``, dropped steps included.
      matrices: a `GroupState` for every shape, by its name, such as ``"64x256"``; of matrices that
        share their bases with others the name begins with how many do, ``"3x64x256"``.
      rest: state of the transformation of all other leaves, in float32 at least.
      complement: state of the complement, ``()`` unless it is an optax transformation.
      dropped: how many steps ``rest`` did not take because something was not finite.
      key: the random key that all later keys come from.
    """

    count: jax.Array
    matrices: Any
    rest: Any
    complement: Any
    dropped: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MatricesEngine(Engine):
    """An engine with a space for every shape of matrices; other leaves go to ``rest``."""

    kind: ClassVar[type] = ScaleByMatrixLREState

    space: ClassVar[type[Matrices]]
    """What the matrices of one shape are."""

    view: View | None = None
    rest: Any = None

    def __post_init__(self):
        check(
            self.view is None or callable(self.view),
            f"{self.owner}: view is {self.view!r}; pass a function of a leaf's path and shape, "
            "such as lowrank_optax.default_matrix_view.",
        )
        check(
            self.rest is None or isinstance(self.rest, optax.GradientTransformation),
            f"{self.owner}: rest is {self.rest!r}; pass an optax.GradientTransformation.",
        )
        super().__post_init__()
        fix = lambda name, value: object.__setattr__(self, name, value)
        fix("told", self.told or self._listens(self.rest))
        fix("rest", self._called(self.rest or optax.scale_by_adam()))

    @property
    @abc.abstractmethod
    def parts(self) -> Any:
        """What the step of a matrix is made of."""

    @abc.abstractmethod
    def _fits(self, a: int, b: int) -> bool:
        """Whether a matrix ``(a, b)``, ``a <= b``, is one of ours."""

    def _init(self, params: Any) -> ScaleByMatrixLREState:
        key, *keys = jax.random.split(jax.random.key(self.seed), 3)
        layout = Layout.of(params, None, self.dtype, self.owner)
        spaces = self._spaces(layout)
        # `optax.tree.map_params` inits a tree without leaves, to find out where parameters are: one
        # number stands for all of this, of which nothing has the structure of the parameters.
        filled = lambda make: make() if layout.names else jnp.zeros(())
        matrices = {
            name: share_out(space.init(keys), layout.mesh) for name, space in spaces.items()
        }
        inside, tx = _places(spaces), self.complement
        beyond = isinstance(tx, optax.GradientTransformation)
        others = [i for i in range(len(layout.names)) if i not in inside]
        return ScaleByMatrixLREState(
            count=jnp.zeros((), jnp.int32),
            matrices=filled(lambda: matrices),
            rest=filled(lambda: self.rest.init(only(layout, others, params))),
            complement=filled(lambda: tx.init(only(layout, inside, params))) if beyond else (),
            dropped=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(key),
        )

    def asked(self, extra: dict[str, Any]) -> dict[str, Any]:
        return extra if self.told else {}

    def layout(self, updates: Any, state: ScaleByMatrixLREState, params: Any) -> Layout:
        """The layout that ``init`` saw: that of the parameters or, without them, of the state."""
        layout = Layout.of(updates if params is None else params, None, self.dtype, self.owner)
        if params is None:
            dtypes = list(layout.dtypes)
            for name, space in self._spaces(layout).items():
                if name in state.matrices:
                    short = space.kept_in(state.matrices[name]).columns
                    for i in space.places:
                        same = jnp.promote_types(dtypes[i], jnp.float32) == short.dtype
                        stored = short.dtypes[0] if short.dtypes != space.columns.dtypes else None
                        dtypes[i] = stored or (dtypes[i] if same else short.dtype)
            layout = dataclasses.replace(layout, dtypes=tuple(dtypes))
        return layout.on(updates)

    def spaces(self, layout: Layout, state: ScaleByMatrixLREState) -> dict[str, Space]:
        return {
            name: space.kept_in(state.matrices[name])
            for name, space in self._spaces(layout).items()
        }

    def states(self, state: ScaleByMatrixLREState) -> dict[str, GroupState]:
        return dict(state.matrices)

    def stored(self, state: ScaleByMatrixLREState, new: dict[str, GroupState]):
        return state._replace(matrices=new)

    def _spaces(self, layout: Layout) -> dict[str, Any]:
        """The matrices of a tree by the names of their shapes."""
        shared: dict[Any, list[int]] = {}
        views = [each.axes for each in see(self.owner, layout.paths, layout.shapes, self.view)]
        for i, view in enumerate(views):
            if view is None:
                continue
            many, *sides = view.sizes(layout.shapes[i])
            if self._fits(*sorted(sides)):
                label = i if self.groups is None else self.groups(layout.paths[i])
                shared.setdefault((*sorted(sides), many, label), []).append(i)
        kinds: dict[str, list[list[int]]] = {}
        for (a, b, *_), members in shared.items():
            many = f"{len(members)}x" if len(members) > 1 else ""
            kinds.setdefault(f"{many}{a}x{b}", []).append(members)
        make = self.space.of
        return {
            name: make(self.parts, layout, views, each, self.owner) for name, each in kinds.items()
        }

    def others(self, layout: Layout, spaces: Any, updates: Any, state: Any, given: Given):
        """The step of the leaves that are no matrices, which is taken by all of them or by none.

        A flag for every leaf would make each leaf's operations a program of its own.
        """
        inside = _places(spaces)
        at = [i for i in range(len(layout.names)) if i not in inside]
        if not at:
            return {}, {}, state
        grads, old = layout.leaves(updates), state.rest
        sound = linalg.finite(*(grads[i] for i in at))
        clean = layout.tree([jnp.where(sound, x, 0) if i in at else x for i, x in enumerate(grads)])
        params = None if given.params is None else only(layout, at, given.params)
        step, new = self.rest.update(only(layout, at, clean), old, params, **given.extra)
        leaves = layout.leaves(step)
        # A second moment that overflowed would divide by infinity for ever.
        burst = [
            jnp.where(jnp.isfinite(y), x, 0)
            for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
            if jnp.issubdtype(x.dtype, jnp.inexact)
        ]
        sound = sound & linalg.finite(*burst, *(leaves[i] for i in at))
        state = state._replace(
            rest=jax.tree.map(partial(jnp.where, sound), new, old),
            dropped=linalg.tally(state.dropped, ~sound),
        )
        step = {i: jnp.where(sound, jnp.reshape(leaves[i], -1), 0) for i in at}
        return step, dict.fromkeys(at, ~sound), state


def _places(spaces: dict[str, Matrices]) -> set[int]:
    """The places of all leaves that are matrices."""
    return {i for space in spaces.values() for i in space.places}
