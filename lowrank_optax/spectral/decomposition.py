"""What a fit returns: eigenvalues with errors, and functions to call."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core.checks import check
from lowrank_optax.spectral import _reading as reading
from lowrank_optax.spectral._fingerprint import Same
from lowrank_optax.spectral.methods import SideMoments, moments
from lowrank_optax.spectral.operators import SampledOperator


class Network(NamedTuple):
    """Functions with parameters: anything with these two, such as a flax module.

    Attributes:
      init: fresh parameters, ``(key, point) -> params``.
      apply: values of the modes, ``(params, point) -> (L,)``.
    """

    init: Callable[[jax.Array, Any], Any]
    apply: Callable[[Any, Any], jax.Array]


def networks_of(network: Any, sides: int) -> tuple[Any, ...]:
    """One network for every side of an operator; a single one serves both sides."""
    whole = lambda n: hasattr(n, "init") and hasattr(n, "apply")
    if whole(network):
        return (network,) * sides
    check(
        isinstance(network, tuple | list) and len(network) == 2,
        f"network is {network!r}; pass a flax module, a pair (init, apply), or two of them for an "
        "operator with two sides.",
    )
    if all(callable(part) and not whole(part) for part in network):
        return (Network(*network),) * sides
    check(sides == 2, "Two networks came for a self-adjoint operator; pass one.")
    return tuple(networks_of(part, 1)[0] for part in network)


def initialize(
    operator: SampledOperator, networks: tuple[Any, ...], key: jax.Array
) -> tuple[Any, ...]:
    """Fresh parameters of every side, made at one of the operator's points."""
    batch = jax.eval_shape(lambda k: operator.sample(k, 2, operator.init()), key)
    batch = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), batch)
    points = [jax.tree.map(lambda a: a[0], side) for side in operator.points(batch)]
    keys = jax.random.split(key, len(networks))
    return tuple(n.init(k, x) for n, k, x in zip(networks, keys, points, strict=True))


def functions_of(networks: tuple[Any, ...], params: tuple[Any, ...]) -> tuple[Any, ...]:
    """Functions of a point for every side."""
    return tuple(
        lambda x, n=n, p=p: jnp.atleast_1d(n.apply(p, x))
        for n, p in zip(networks, params, strict=True)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Decomposition:
    """Eigen- or singular functions of an operator, in descending order and of norm one.

    Mode ``l`` is ``sum_j f_j W_jl`` of the network's outputs ``f``, with the ``W`` that
    diagonalises the operator in the span of the outputs (Rayleigh-Ritz); `raw` takes the outputs
    one by one. Where the operator holds data out, ``W`` comes from the data of the training, and
    everything that is read comes from the others.

    Attributes:
      operator: the operator.
      networks: a network for every side.
      params: the parameters of every side, averaged over the last steps where the fit did so.
      moments: the `SideMoments` of every side, ``(n, L, L)`` for ``n`` independent batches.
      rotation: the matrix ``W`` of every side, ``(L, L)``.
      step: the number of steps taken.
      message: the reason why the fit ended.
      history: a record for every evaluation, a tuple of dictionaries.
      seen: the `SideMoments` on the data of the training, where others were held out of it, else
        ``None``.
      method: the method of the fit, its ``repr``.
      least: number at and below which a value is no mode that the method can find, minus infinity
        where it finds any.

    Cost: memory ``3 n L²`` for each side beside the parameters; eigenvalues and errors take
    ``6 n L³`` flops in float64.

    Source: elementary.

    Example:
      >>> import numpy as np
      >>> from lowrank_optax import spectral
      >>> operator = spectral.operators.Matrix(np.diag([1.0, 4.0]))
      >>> eye, cross, image = np.eye(2), np.diag([1.0, 4.0]), np.diag([1.0, 16.0])
      >>> moments = spectral.SideMoments(eye[None], cross[None], image[None])
      >>> found = spectral.Decomposition.of(operator, (), (), (moments,))
      >>> print(found.eigenvalues, found.residuals, found.converged)
      [4. 1.] [0. 0.] [ True  True]
    """

    operator: SampledOperator
    networks: tuple[Any, ...]
    params: tuple[Any, ...]
    moments: tuple[SideMoments, ...]
    rotation: tuple[np.ndarray, ...]
    step: int = 0
    message: str = ""
    history: tuple[dict[str, Any], ...] = ()
    seen: tuple[SideMoments, ...] | None = None
    method: str = ""
    least: float = -np.inf

    @classmethod
    def of(
        cls,
        operator: SampledOperator,
        networks: Any,
        params: Any,
        moments: Any,
        seen: Any = None,
        **rest: Any,
    ):
        """Reads out by Rayleigh-Ritz."""
        whole = lambda m: jax.tree.map(lambda a: np.asarray(a, np.float64), tuple(m))
        read, seen = whole(moments), None if seen is None else whole(seen)
        return cls(operator, networks, params, read, (), seen=seen, **rest).ritz()

    @property
    def eigenvalues(self) -> np.ndarray:
        """The Rayleigh quotients ``<f, T f> / ‖f‖²``, ``(L,)``; singular values with two sides.

        See `converged` for which of them are modes that were found.
        """
        return reading.quotients(self._read)

    @property
    def singular_values(self) -> np.ndarray:
        """The `eigenvalues` of an operator with two sides, ``(L,)``."""
        return self.eigenvalues

    @property
    def fitted_eigenvalues(self) -> np.ndarray:
        """The same quotients on the data of the training, ``(L,)``.

        Values far above `eigenvalues` say that the functions have learned their data by heart.
        Where nothing was held out they are the eigenvalues.
        """
        seen = self.moments if self.seen is None else self.seen
        return reading.quotients(reading.turned(reading.mean(seen), self.rotation))

    @property
    def sampling_errors(self) -> np.ndarray:
        """The part of `errors` that the sampling of the evaluation makes, ``(L,)``.

        By the jackknife over batches; ``nan`` for a single batch.
        """
        return reading.sampling(self.moments, self.rotation)

    @property
    def errors(self) -> np.ndarray:
        r"""Standard errors of `eigenvalues`, ``(L,)``.

        .. math:: \sqrt{\text{sampling}^2 + \min(\text{movement}, \text{residual})^2}

        with the movement since half the steps, which estimates the way that is left. Where a
        single batch is all there is, nothing is sampled and the residual, within which there is an
        eigenvalue, is the error, but no less than the rounding of moments in float32 allows to
        tell; ``nan`` where there is no residual either.
        """
        if len(self.moments[0].gram) == 1:
            bound = self.residuals
            if bound is None:
                return np.full(len(self.eigenvalues), np.nan)
            return np.maximum(bound, reading.ROUNDING * np.abs(self.eigenvalues))
        bound = np.inf if self.residuals is None else self.residuals
        drift = np.minimum(np.nan_to_num(self.movement), bound)
        return np.hypot(self.sampling_errors, drift)

    @property
    def movement(self) -> np.ndarray:
        """How far `eigenvalues` are from those at half the steps, ``(L,)``; ``nan`` if unknown."""
        return reading.moved(self.history, self.eigenvalues, self.step)

    @property
    def converged(self) -> np.ndarray:
        """Which modes were found, booleans ``(L,)``.

        A mode counts when its outputs do not depend on earlier ones, its value is above ``least``
        by two errors, its error is below a tenth of it, and it moved less than that since half the
        steps.
        """
        live = np.asarray(self.rotation[0].any(axis=0))
        return reading.found(self.eigenvalues, self.errors, self.movement, live, self.least)

    @property
    def score(self) -> float:
        r"""The sum of `eigenvalues`; of held-out data how much a model of the others explains.

        .. math:: 2 \sum_l s_l \langle f_l, T g_l\rangle
                  - \sum_{lm} s_l s_m \langle f_l, f_m\rangle \langle g_l, g_m\rangle

        with modes of norm one and values ``s`` on the data of the training, and inner products on
        those held out. It falls when the modes learn their data by heart.
        """
        if self.seen is None:
            return float(np.sum(self.eigenvalues))
        seen = reading.mean(self.seen)
        return reading.score(reading.mean(self.moments), seen, self.rotation)

    @property
    def gram(self) -> np.ndarray:
        """The inner products of the modes, ``(L, L)``: the identity where they are orthonormal."""
        return self._read[0].gram

    @property
    def residuals(self) -> np.ndarray | None:
        """``‖T f - lam f‖`` of modes of norm one, ``(L,)``; ``None`` where images are only samples.

        A self-adjoint operator has an eigenvalue within that distance of ``lam``, an operator with
        two sides a singular value. With a singular potential the singularity dominates the
        residual, unless the functions have its exact cusp.
        """
        return reading.residuals(self._read) if self.operator.exact else None

    def ritz(self) -> "Decomposition":
        """The same span with modes that diagonalise the operator in it (Rayleigh-Ritz).

        A `Decomposition` is read so from the start; this undoes `raw`. Where outputs depend on each
        other, modes that are 0 take the last places.

        Returns:
          Another `Decomposition` of the same functions.

        Cost: one ``eigh`` or ``svd`` of ``L x L``, in float64.
        """
        return self._rotated(reading.ritz_rotation)

    def raw(self) -> "Decomposition":
        """The network's outputs one by one, ordered and of norm one, not mixed with each other.

        They show what a method has found by itself: whether it orders its modes, and how far they
        are from orthogonal (`gram`).

        Returns:
          Another `Decomposition` of the same functions.
        """
        return self._rotated(reading.raw_rotation)

    def read_on(self, operator: SampledOperator) -> "Decomposition":
        """The same modes, read from other data that they have not seen.

        Args:
          operator: an operator of the same kind made from the other data, all of which is used.

        Returns:
          Another `Decomposition`, whose `seen` is what this one was read from or learned from, so
          that its `score` is that of the model on the new data.

        Raises:
          ValueError: for an operator that is not made from data.

        Cost: one application of the operator to all of its data, compiled anew.

        Example:
          >>> import jax.numpy as jnp, numpy as np
          >>> from lowrank_optax import spectral
          >>> operator = spectral.operators.Matrix(np.diag([1.0, 4.0]))
          >>> sizes = [1, 1], [1, 4], [1, 16]
          >>> moments = spectral.SideMoments(*(np.diag(x)[None] / 2 for x in sizes))
          >>> network = spectral.Network(lambda key, i: (), lambda p, i: jnp.eye(2)[i])
          >>> found = spectral.Decomposition.of(operator, (network,), ((),), (moments,))
          >>> print(found.read_on(spectral.operators.Matrix(np.diag([1.0, 3.0]))).eigenvalues)
          [3. 1.]
        """
        field = operator.__dataclass_fields__.get("held_out_part")
        none: dict[str, Any] = {"held_out_part": 0.0}
        whole = dataclasses.replace(operator, **none) if field and field.init else operator
        batches = whole.held_out()[1]
        check(
            batches is not None,
            f"Decomposition: a {type(operator).__name__} draws fresh points and has no data; pass "
            "an operator made from data.",
        )
        functions = functions_of(self.networks, self.params)

        def one(batch: Any) -> tuple[SideMoments, ...]:
            out = whole.apply(*functions, batch)
            return moments(tuple(zip(out[::2], out[1::2], strict=True)))

        read = jax.jit(lambda batches: jax.lax.map(one, batches))(batches)
        rest = {"step": self.step, "method": self.method, "least": self.least}
        seen = self.moments if self.seen is None else self.seen
        return Decomposition.of(operator, self.networks, self.params, read, seen, **rest)

    def function(self, side: int = 0) -> Callable[[Any], jax.Array]:
        """A function from one point to the modes ``(L,)`` of a side, for `jax.grad` and `jax.jit`.

        Args:
          side: 0 for eigenfunctions and left singular functions, the default; 1 for right ones.

        Returns:
          The function.

        Raises:
          ValueError: for a side that the operator does not have.
        """
        self._check_side(side)
        dressed = self.operator.dress(functions_of(self.networks, self.params)[side])
        rotation = jnp.asarray(self.rotation[side], jnp.float32)
        return lambda x: dressed(x) @ rotation.astype(jnp.result_type(dressed(x)))

    def __call__(self, points: Any, side: int = 0) -> np.ndarray:
        """The modes at points ``(n, ...)``.

        Args:
          points: the points, a pytree whose first axes have ``n`` entries.
          side: 0 for eigenfunctions and left singular functions, the default; 1 for right ones.

        Returns:
          The values, ``(n, L)``.

        Raises:
          ValueError: for a side that the operator does not have.

        Cost: compiled once for all numbers of points up to the same power of two.
        """
        self._check_side(side)
        points = jax.tree.map(jnp.asarray, points)
        count = len(jax.tree.leaves(points)[0])
        more = (1 << max(count - 1, 0).bit_length()) - count if count else 0
        padded = jax.tree.map(lambda a: jnp.concatenate([a, jnp.repeat(a[:1], more, 0)]), points)
        parts = Same(self.operator), Same(self.networks[side])
        rotation = jnp.asarray(self.rotation[side], jnp.float32)
        return np.asarray(_values(parts, self.params[side], rotation, padded)[:count])

    def save(self, path: str) -> None:
        """Writes the numbers to an ``.npz``; operator and network are code and stay with you.

        Args:
          path: the file, which is replaced where it exists.
        """
        arrays: dict[str, Any] = {
            f"param_{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(self.params))
        }
        for i, (side, turn) in enumerate(zip(self.moments, self.rotation, strict=True)):
            arrays |= {f"{name}_{i}": value for name, value in side._asdict().items()}
            arrays[f"rotation_{i}"] = turn
        for i, side in enumerate(self.seen or ()):
            arrays |= {f"seen_{name}_{i}": value for name, value in side._asdict().items()}
        names = "step", "message", "history", "method", "least"
        about = {name: getattr(self, name) for name in names}
        with open(path, "wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), **arrays)

    @classmethod
    def load(cls, path: str, operator: SampledOperator, network: Any) -> "Decomposition":
        """Reads what `save` wrote.

        Args:
          path: the file.
          operator: the operator of the fit.
          network: the network of the fit.

        Returns:
          The `Decomposition`.

        Raises:
          ValueError: where the file's parameters are not the network's.
        """
        networks = networks_of(network, operator.sides)
        like = jax.eval_shape(lambda k: initialize(operator, networks, k), jax.random.key(0))
        with np.load(path) as data:
            leaves, tree = jax.tree.flatten(like)
            names = [f"param_{i}" for i in range(len(leaves))]
            shapes = [data[n].shape for n in names if n in data]
            check(
                f"param_{len(leaves)}" not in data and shapes == [x.shape for x in leaves],
                f"{path} holds parameters of shapes {shapes}; pass the network they belong to.",
            )
            # numpy knows no bfloat16 and gives its bytes back.
            read = [data[n].view(x.dtype) for n, x in zip(names, leaves, strict=True)]
            about = json.loads(str(data["about"]))
            sides = range(operator.sides)
            side = lambda i, prefix="": SideMoments(
                *(data[f"{prefix}{n}_{i}"] for n in SideMoments._fields)
            )
            return cls(
                operator,
                networks,
                jax.tree.unflatten(tree, [jnp.asarray(x) for x in read]),
                tuple(side(i) for i in sides),
                tuple(data[f"rotation_{i}"] for i in sides),
                seen=tuple(side(i, "seen_") for i in sides) if "seen_gram_0" in data else None,
                **(about | {"history": tuple(about["history"])}),
            )

    def __repr__(self) -> str:
        rows = list(zip(self.eigenvalues, self.errors, self.converged, strict=True))
        told = lambda kind: ", ".join(f"{v:.4g} ± {e:.1g}" for v, e, c in rows if c == kind)
        missing = "" if self.converged.all() else f"not converged: {told(False)}; "
        return f"Decomposition({told(True)}; {missing}step {self.step}, {self.message})"

    def _check_side(self, side: Any) -> None:
        check(
            side in range(self.operator.sides),
            f"Decomposition: side is {side!r} and a {type(self.operator).__name__} has "
            f"{list(range(self.operator.sides))}; pass one of these.",
        )

    @property
    def _read(self) -> tuple[SideMoments, ...]:
        return reading.turned(reading.mean(self.moments), self.rotation)

    def _rotated(self, rule: Callable[[Any], tuple[np.ndarray, ...]]) -> "Decomposition":
        moments = reading.mean(self.moments)
        if self.seen is None:
            return dataclasses.replace(self, rotation=rule(moments))
        rotation = reading.in_order(rule(reading.mean(self.seen)), moments)
        return dataclasses.replace(self, rotation=rotation)


@partial(jax.jit, static_argnums=0)
def _values(parts: tuple[Same, Same], params: Any, rotation: jax.Array, points: Any) -> jax.Array:
    operator, network = (same.part for same in parts)
    dressed = operator.dress(functions_of((network,), (params,))[0])
    outputs = jax.vmap(dressed)(points)
    return outputs @ rotation.astype(outputs.dtype)
