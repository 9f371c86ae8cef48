"""How an optimizer of matrices treats every leaf, as a table."""

from typing import Any, NamedTuple

from lowrank_optax.engine.axes import MatrixAxes
from lowrank_optax.engine.kronecker import directions


class LeafView(NamedTuple):
    """How a leaf is treated by an optimizer of matrices.

    Attributes:
      path: the leaf's path as text.
      shape: its shape.
      axes: the `MatrixAxes` that it is seen by, ``None`` for a leaf that goes to the rest.
      matrices: number of matrices ``B``, of rows and of columns, ``(B, R, C)``; ``None`` likewise.
      why: what it was taken for, and which sides have no basis for being too long.
    """

    path: str
    shape: tuple[int, ...]
    axes: MatrixAxes | None
    matrices: tuple[int, int, int] | None
    why: str


class LeafViews(NamedTuple):
    """How every leaf of a tree is treated; prints as a table.

    Attributes:
      leaves: a `LeafView` for every leaf, in the order of the tree.
    """

    leaves: tuple[LeafView, ...]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        sizes = [each.matrices for each in self.leaves]
        seen = ["rest" if s is None else f"{s[1]} x {s[2]}" for s in sizes]
        many = [f"{s[0]} of " if s is not None and s[0] > 1 else "" for s in sizes]
        rows = [("leaf", "shape", "seen as", "")] + [
            (each.path or "the tree", str(each.shape), count + size, each.why)
            for each, count, size in zip(self.leaves, many, seen, strict=True)
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        line = lambda row: "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip()
        return "\n".join(map(line, rows))


def treated(path: str, shape: Any, axes: MatrixAxes | None, why: str, made: Any) -> LeafView:
    """A leaf's row, after an optimizer has looked at the lengths of its sides.

    Args:
      path: the leaf's path as text.
      shape: its shape.
      axes: how it is seen.
      why: what it was taken for.
      made: the optimizer's parts by name, as far as they are known.
    """
    if axes is None:
        return LeafView(path, shape, None, None, why)
    sizes, bound = axes.sizes(shape), made.get("largest")
    given = [made[name] for name in ("short", "long") if name in made]
    if given and all(x is None or isinstance(x, int) for x in given):  # `scale_by_kronecker`
        (short, long), (a, b) = given, sorted(sizes[1:])
        ranks = directions(short, long, bound, made.get("aspect"), a, b)
        kept = zip(ranks, (a, b), strict=True)
        few = [f"{r} of {d} directions" for r, d in kept if r < d]
        return LeafView(path, shape, axes, sizes, "; ".join([why, *few]))
    pairs = zip(("short", "long"), sorted(sizes[1:]), strict=True)
    told = {"short", "long"} & made.keys()
    sides = [size for name, size in pairs if not told or made.get(name) is not None]
    long = [size for size in sides if bound is not None and size > bound]
    if long:
        why += "; " + "".join(f"{size} > " for size in reversed(long)) + f"largest={bound}"
    if len(long) == len(sides):
        return LeafView(path, shape, None, None, why)
    return LeafView(path, shape, axes, sizes, why + ": no basis there" if long else why)
