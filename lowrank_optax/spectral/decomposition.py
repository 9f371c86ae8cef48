"""What a fit returns: eigenvalues with errors, and functions to call."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core.checks import check
from lowrank_optax.spectral.methods import SideMoments
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

    Mode ``l`` is ``sum_j f_j W_jl`` of the network's outputs ``f``. By default ``W`` orders and
    normalises; `ritz` makes it diagonalise the operator in the span.

    Attributes:
      operator: the operator.
      networks: a network for every side.
      params: the parameters of every side, averaged over the last steps where the fit did so.
      moments: the `SideMoments` of every side, ``(n, L, L)`` for ``n`` batches of an evaluation.
      rotation: the matrix ``W`` of every side, ``(L, L)``.
      step: the number of steps taken.
      message: the reason why the fit ended.
      history: a record for every evaluation, a tuple of dictionaries.

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
      >>> print(found.eigenvalues, found.residuals)
      [4. 1.] [0. 0.]
    """

    operator: SampledOperator
    networks: tuple[Any, ...]
    params: tuple[Any, ...]
    moments: tuple[SideMoments, ...]
    rotation: tuple[np.ndarray, ...]
    step: int = 0
    message: str = ""
    history: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, operator: SampledOperator, networks: Any, params: Any, moments: Any, **rest: Any):
        """Orders and normalises the outputs; singular values are made positive."""
        moments = jax.tree.map(lambda a: np.asarray(a, np.float64), tuple(moments))
        mean = _mean(moments)
        sizes = [np.sqrt(np.diagonal(side.gram)) for side in mean]
        inverse = [np.divide(1.0, s, out=np.zeros_like(s), where=s > 0) for s in sizes]
        with np.errstate(invalid="ignore"):  # the start of a fit that is about to be refused
            values = np.diagonal(mean[0].cross) * inverse[0] * inverse[-1]
        if len(mean) == 2:
            inverse[1] = np.where(values < 0, -inverse[1], inverse[1])
            values = np.abs(values)
        order = np.argsort(-values, kind="stable")
        rotation = tuple(np.diag(scale)[:, order] for scale in inverse)
        return cls(operator, networks, params, moments, rotation, **rest)

    @property
    def eigenvalues(self) -> np.ndarray:
        """The Rayleigh quotients ``<f, T f> / ‖f‖²``, ``(L,)``; singular values with two sides."""
        return _quotients(self._turned(_mean(self.moments)))

    @property
    def singular_values(self) -> np.ndarray:
        """The `eigenvalues` of an operator with two sides, ``(L,)``."""
        return self.eigenvalues

    @property
    def errors(self) -> np.ndarray:
        """The standard errors of `eigenvalues`, ``(L,)``, by the jackknife over batches.

        They measure the sampling of the evaluation, not how far the functions are from converged.
        They are ``nan`` for a single batch.
        """
        n = len(self.moments[0].gram)
        if n < 2:
            return np.full(len(self.gram), np.nan)
        total = _mean(self.moments)
        left_out = [
            jax.tree.map(
                lambda mean, each, i=i: (n * mean - each[i]) / (n - 1), total, self.moments
            )
            for i in range(n)
        ]
        values = np.stack([_quotients(self._turned(m)) for m in left_out])
        return np.sqrt((n - 1) * np.mean((values - values.mean(0)) ** 2, 0))

    @property
    def gram(self) -> np.ndarray:
        """The inner products of the modes, ``(L, L)``: the identity where they are orthonormal."""
        return self._turned(_mean(self.moments))[0].gram

    @property
    def residuals(self) -> np.ndarray | None:
        """``‖T f - lam f‖`` of modes of norm one, ``(L,)``; ``None`` where images are only samples.

        A self-adjoint operator has an eigenvalue within that distance of ``lam``. With a singular
        potential the singularity dominates the residual, unless the functions have its exact cusp.
        """
        if not self.operator.exact:
            return None
        side = self._turned(_mean(self.moments))[0]
        lam = self.eigenvalues
        diagonal = np.diagonal
        square = (
            diagonal(side.image) - 2 * lam * diagonal(side.cross) + lam**2 * diagonal(side.gram)
        )
        return np.sqrt(np.maximum(square, 0))

    def ritz(self) -> "Decomposition":
        """The same span with modes that diagonalise the operator in it (Rayleigh-Ritz).

        Where outputs depend on each other, modes that are 0 take the last places.

        Returns:
          Another `Decomposition` of the same functions.

        Cost: one ``eigh`` or ``svd`` of ``L x L``, in float64.
        """
        sides = _mean(self.moments)
        whiten = [_whitening(side.gram) for side in sides]
        between = whiten[0].T @ sides[0].cross @ whiten[-1]
        if len(sides) == 1:
            values, vectors = np.linalg.eigh((between + between.T) / 2)
            turns = [vectors[:, np.argsort(-values)]]
        else:
            u, _, vt = np.linalg.svd(between, full_matrices=False)
            turns = [u, vt.T]
        modes = len(sides[0].gram)
        rotation = [w @ turn for w, turn in zip(whiten, turns, strict=True)]
        padded = tuple(np.pad(r, ((0, 0), (0, modes - r.shape[1]))) for r in rotation)
        return dataclasses.replace(self, rotation=padded)

    def function(self, side: int = 0) -> Callable[[Any], jax.Array]:
        """A function from one point to the modes ``(L,)`` of a side, for `jax.grad` and `jax.jit`.

        Args:
          side: 0 for eigenfunctions and left singular functions, the default; 1 for right ones.

        Returns:
          The function.
        """
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
        """
        return np.asarray(jax.jit(jax.vmap(self.function(side)))(jax.tree.map(jnp.asarray, points)))

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
        about = {"step": self.step, "message": self.message, "history": self.history}
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
            return cls(
                operator,
                networks,
                jax.tree.unflatten(tree, [jnp.asarray(x) for x in read]),
                tuple(SideMoments(*(data[f"{n}_{i}"] for n in SideMoments._fields)) for i in sides),
                tuple(data[f"rotation_{i}"] for i in sides),
                about["step"],
                about["message"],
                tuple(about["history"]),
            )

    def __repr__(self) -> str:
        rows = zip(self.eigenvalues, self.errors, strict=True)
        values = ", ".join(f"{value:.4g} ± {error:.1g}" for value, error in rows)
        return f"Decomposition({values}; step {self.step}, {self.message})"

    def _turned(self, sides: tuple[SideMoments, ...]) -> tuple[SideMoments, ...]:
        turned = []
        for side, own, other in zip(sides, self.rotation, self.rotation[::-1], strict=True):
            gram, cross, image = own.T @ side.gram @ own, own.T @ side.cross @ other, other.T
            turned.append(SideMoments(gram, cross, image @ side.image @ other))
        return tuple(turned)


def _mean(moments: tuple[SideMoments, ...]) -> tuple[SideMoments, ...]:
    return jax.tree.map(lambda a: a.mean(0), moments)


def _quotients(sides: tuple[SideMoments, ...]) -> np.ndarray:
    norms = np.sqrt(np.diagonal(sides[0].gram) * np.diagonal(sides[-1].gram))
    return np.diagonal(sides[0].cross) / np.where(norms > 0, norms, 1)


def _whitening(gram: np.ndarray) -> np.ndarray:
    """``(L, k)``, ``W^T G W = 1``: a basis of what moments in float32 can tell apart."""
    size = np.sqrt(np.diagonal(gram))
    size = np.where(size > 0, size, 1)
    values, vectors = np.linalg.eigh(gram / size[:, None] / size)
    live = values > len(gram) * np.finfo(np.float32).eps * values[-1]
    return vectors[:, live] / np.sqrt(values[live]) / size[:, None]
