"""How a leaf is seen as a matrix."""

import math
from collections.abc import Callable
from typing import Any

View = Callable[[Any, tuple[int, ...]], tuple[int, int] | None]
"""A function of a leaf's path and shape to the rows and columns it is seen as, or ``None``."""


def default_matrix_view(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The split of a shape's axes into rows and columns that gives the squarest matrix.

    Example:
      >>> from lowrank_optax import default_matrix_view
      >>> [default_matrix_view(shape) for shape in ((64, 4, 16), (3, 3, 16, 32), (10,), (1, 10))]
      [(64, 64), (144, 32), None, None]

    Args:
      shape: a leaf's shape.

    Returns:
      The numbers of rows and columns; ``None`` for vectors and for matrices of one row or column.
    """
    splits = ((math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape)))
    best = max(splits, key=min, default=(0, 0))
    return best if min(best) > 1 else None
