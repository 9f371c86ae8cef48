"""The interface of scikit-learn for streams of vectors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from lowrank_optax._core.checks import check, check_count, check_decay
from lowrank_optax.online.trackers import Tracker

CHUNK = 256


class StreamingPCA(TransformerMixin, BaseEstimator):
    r"""Principal components of a stream in batches of any size, with a running mean.

    What is kept of the past, ``m`` directions ``V`` with sums of squares ``s^2``, is joined with a
    batch ``X`` of total weight ``w``, after ``W`` before, as one matrix, whose leading singular
    vectors are kept:

    .. math:: \Big[\mathrm{diag}(s) V;\; \sqrt{w_i} (x_i - \bar x);\;
              \sqrt{W w / (W + w)}\, (\mu - \bar x)\Big]

    That is exact up to what is truncated. The last row is what a moving mean brings along.

    Args:
      n_components: number ``r`` of components, at least 1, default 2.
      beta: decay of the past per vector, in [0, 1); ``None``, the default, never forgets.
      window: number of last vectors that count, all others being removed exactly; default ``None``,
        all. It keeps these vectors, and excludes ``beta`` and ``tracker``.
      slots: number ``m`` of directions that are kept, at least ``r``, default ``2 r``.
      tracker: a tracker of rank ``r`` that follows the centred vectors instead, with a forgetting
        and a mean of its own: that of all vectors. Default ``None``.
      center: whether the running mean is taken away, default yes.

    Attributes:
      components_: orthonormal components ``(r, d)``, the leading one first.
      explained_variance_: their variances ``(r,)``, of weights that sum to one.
      mean_: the running mean ``(d,)``.
      n_samples_seen_: number of vectors taken in.

    Raises:
      ValueError: by ``fit`` and ``partial_fit``, for numbers out of range, choices that exclude
        each other, or weights that are negative or of another number than the vectors.

    Cost: memory ``m d``; ``2 (m + k) (2 m + k) d`` flops for ``k`` vectors, in chunks of 256.

    Source: Ross, Lim, Lin and Yang, "Incremental learning for robust visual tracking", IJCV 2008;
    Brand, "Fast low-rank modifications of the thin singular value decomposition", 2006.

    Example:
      >>> import numpy as np
      >>> from lowrank_optax.online.estimator import StreamingPCA
      >>> x = np.random.default_rng(0).normal(size=(300, 5)) * [9, 5, 1, 1, 1] + 7
      >>> model = StreamingPCA(2)
      >>> for batch in np.split(x, [10, 11, 150]):
      ...     model = model.partial_fit(batch)
      >>> print(model.transform(x).shape, np.allclose(model.mean_, x.mean(0)))
      (300, 2) True
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        beta: float | None = None,
        window: int | None = None,
        slots: int | None = None,
        tracker: Tracker | None = None,
        center: bool = True,
    ):
        self.n_components = n_components
        self.beta = beta
        self.window = window
        self.slots = slots
        self.tracker = tracker
        self.center = center

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "StreamingPCA":
        """Forgets what it knows and learns from data ``(n, d)``; ``y`` is not used."""
        for name in ("_weight", "n_samples_seen_"):
            vars(self).pop(name, None)
        return self.partial_fit(X, y, sample_weight)

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "StreamingPCA":
        """Goes on with data ``(n, d)``, the latest last, and weights ``(n,)``, by default 1."""
        fresh = not hasattr(self, "_weight")
        X = validate_data(self, X, dtype=np.float64, reset=fresh)
        if fresh:
            self._begin(X.shape[1])
        w = np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight, float)
        check(
            w.shape == (len(X),) and bool(np.all(w >= 0)),
            f"StreamingPCA: sample_weight has shape {w.shape} for {len(X)} vectors; pass one "
            "weight of at least 0 for each.",
        )
        self.n_samples_seen_ += len(X)
        if self.window is not None:
            self._last = np.concatenate([self._last, X])[-self.window :]
            self._weights = np.concatenate([self._weights, w])[-self.window :]
            self._forget()
            X, w = self._last, self._weights
        for start in range(0, len(X), CHUNK):
            self._join(X[start : start + CHUNK], w[start : start + CHUNK])
        self._show()
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Codes ``(n, r)`` of data ``(n, d)``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return (X - self.mean_) @ self.components_.T

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Vectors ``(n, d)`` of codes ``(n, r)``."""
        check_is_fitted(self)
        return np.asarray(X) @ self.components_ + self.mean_

    def _begin(self, d: int) -> None:
        owner = "StreamingPCA"
        check_count(owner, "n_components", self.n_components)
        check(self.n_components <= d, f"{owner}: n_components is {self.n_components}; pass <= {d}.")
        if self.beta is not None:
            check_decay(owner, "beta", self.beta)
        if self.window is not None:
            check_count(owner, "window", self.window)
        check(
            self.window is None or (self.beta is None and self.tracker is None),
            f"{owner}: a window excludes beta and tracker; pass the window alone.",
        )
        check(
            self.tracker is None
            or (isinstance(self.tracker, Tracker) and self.tracker.rank == self.n_components),
            f"{owner}: tracker is {self.tracker!r}; pass one of rank {self.n_components}, such as "
            f"lowrank_optax.online.trackers.PAST({self.n_components}).",
        )
        slots = 2 * self.n_components if self.slots is None else self.slots
        check(slots >= self.n_components, f"{owner}: slots is {slots}; pass n_components or more.")
        self._slots, self.n_samples_seen_ = min(slots, d), 0
        self._last, self._weights = np.zeros((0, d)), np.zeros(0)
        self.mean_ = np.zeros(d)
        if self.tracker is not None:
            example = jnp.zeros(d, jnp.float32)
            self._state = self.tracker.init(jax.random.key(0), example)
            self._update = jax.jit(self.tracker.update)
        self._forget()

    def _forget(self) -> None:
        """Nothing is known of the past."""
        self._weight, self._rows = 0.0, np.zeros((0, len(self.mean_)))
        self.mean_ = np.zeros_like(self.mean_)

    def _join(self, X: np.ndarray, w: np.ndarray) -> None:
        """The past and a chunk as one matrix, whose leading singular vectors are kept."""
        if self.beta is not None:
            w = w * self.beta ** np.arange(len(X) - 1, -1, -1.0)
            fade = self.beta ** len(X)
            self._weight, self._rows = fade * self._weight, fade**0.5 * self._rows
        new = w.sum()
        if new == 0:
            return
        total, own = self._weight + new, w @ X / new if self.center else self.mean_
        jump = np.sqrt(self._weight * new / total) * (self.mean_ - own)
        self.mean_ = self.mean_ + new / total * (own - self.mean_)
        self._weight = total
        if self.tracker is not None:
            # Rows of NaN fill the chunk, so that one program serves all sizes; trackers skip them.
            full = np.full((CHUNK, X.shape[1]), np.nan, np.float32)
            full[: len(X)] = np.sqrt(w)[:, None] * (X - self.mean_)
            self._state = self._update(self._state, full)
            return
        stacked = np.concatenate([self._rows, np.sqrt(w)[:, None] * (X - own), jump[None]])
        if len(stacked) < stacked.shape[1]:
            square, u = np.linalg.eigh(stacked @ stacked.T)
            self._rows = u[:, ::-1][:, : self._slots].T @ stacked
        else:
            square, v = np.linalg.eigh(stacked.T @ stacked)
            root = np.sqrt(np.maximum(square[::-1][: self._slots], 0))
            self._rows = root[:, None] * v.T[::-1][: self._slots]

    def _show(self) -> None:
        """The components and their variances."""
        r = self.n_components
        if self.tracker is not None:
            op = self.tracker.operator(self._state)
            self.components_ = np.asarray(op.rows, np.float64)
            self.explained_variance_ = np.asarray(op.eigenvalues(), np.float64)
            return
        square = np.sum(self._rows**2, axis=1)[:r]
        # Directions without a variance of their own are any orthonormal ones.
        some = square > 1e-12 * max(square.max(initial=0), np.finfo(float).tiny)
        unit = self._rows[:r][some] / np.sqrt(square[some])[:, None]
        q = np.linalg.qr(np.concatenate([unit, np.eye(len(self.mean_))[:r]]).T)[0].T[:r]
        q[: len(unit)] = unit
        self.components_ = q
        self.explained_variance_ = np.zeros(r)
        self.explained_variance_[: len(unit)] = square[some] / self._weight
