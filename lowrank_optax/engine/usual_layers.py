"""What a leaf of flax's or equinox's usual modules is, by its name, its shape and its neighbours.

A bias ``(L, n)`` beside a kernel ``(L, m, n)`` says that there are ``L`` kernels; one of shape
``(heads, k)`` beside a kernel ``(d, heads, k)`` says that ``d`` are the rows. What holds for the
biases and scales of a module holds for its other leaves.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax

from lowrank_optax.engine.axes import MatrixAxes

Words = tuple[str, ...]
"""A path in words, without what a box of flax appends."""

_VECTOR = re.compile(r"(^|[/_])(bias(es)?|scale|offset)(_\w+)?$")
_NORM = re.compile(r"norm(alization)?_?\d*$|(^|_)(ln|rms)_?\d*$", re.IGNORECASE)
_KERNEL = re.compile(r"^(kernel|weight\w*|[wW]\d*)$")
_EMBEDDING = re.compile(r"emb(ed)?(ding)?s?_?\d*$|^w[tp]e$|^pos(ition(al|s)?)?$", re.IGNORECASE)
_HEAD = re.compile(r"(^|_)head$|^heads$|^logits$|^classifier$|^unembed|^readout$", re.IGNORECASE)
_SPREADS = re.compile(r"^(query|key|value|q|k|v|qkv)(_|$)")
_GATHERS = re.compile(r"^(out|output|o)(_|$)")
_CONVOLUTION = re.compile(r"conv", re.IGNORECASE)
_STACK = re.compile(r"^(Scan|Vmap)[A-Z]|scan|vmap|stacked")
_EXPERTS = re.compile(r"experts?(_|\d|$)", re.IGNORECASE)


class Treatment(NamedTuple):
    """How a leaf is seen.

    Attributes:
      axes: its axes, or ``None`` where it is left to the rest.
      why: what it was taken for, in a few words.
    """

    axes: MatrixAxes | None
    why: str


class _Fit(NamedTuple):
    """What a bias says about the kernel beside it.

    Attributes:
      batch: number of leading batch axes of both.
      outputs: number of axes of what comes out; they are last, but in equinox there is one, first.
      first: whether it comes first.
    """

    batch: int
    outputs: int
    first: bool


class _Leaf(NamedTuple):
    """A leaf's module, its name there, and its shape."""

    module: Words
    name: str
    shape: tuple[int, ...]

    @property
    def owner(self) -> str:
        """The name of its module."""
        return self.module[-1] if self.module else ""


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """The leaves of a tree, and what they say of one another; places number the leaves.

    Attributes:
      leaves: all of them.
    """

    leaves: tuple[_Leaf, ...]

    @classmethod
    def of(cls, paths: Sequence[Any], shapes: Sequence[Sequence[int]]) -> "Tree":
        """The tree of leaves with these key paths and shapes."""
        return _tree(tuple(map(words_of, paths)), tuple(map(tuple, shapes)))

    def treatment(self, place: int, embeddings: bool = True, heads: bool = True) -> Treatment:
        """How a leaf is seen."""
        shape = self.leaves[place].shape
        if math.prod(shape) == 0:
            return Treatment(None, "no entries")
        if len(shape) < 2:
            return Treatment(None, "vector" if shape else "scalar")
        if self._is_vector(place):
            return Treatment(None, "bias or scale")
        axes, why = self._judge(place)
        wanted = {"embedding": embeddings, "head": heads}.get(why, True)
        if axes is None or not wanted:
            return Treatment(None, why)
        _, rows, columns = axes.sizes(shape)
        return Treatment(axes, why) if min(rows, columns) > 1 else _THIN

    def _judge(self, place: int) -> Treatment:
        """A leaf that is no vector by its name."""
        leaf, fit, batch = self.leaves[place], self._fits.get(place), self._batch(place)
        core, axes = leaf.shape[batch:], tuple(range(len(leaf.shape)))
        split = lambda k: MatrixAxes(axes[batch:][:k], axes[batch:][k:], axes[:batch])
        kernel = bool(_KERNEL.search(leaf.name))
        if len(core) < 2:
            return Treatment(None, "vector")
        if _is_embedding(leaf):
            return Treatment(split(-1), "embedding")
        if len(core) == 2:
            head = _HEAD.search(leaf.owner if kernel else leaf.name) or core in self._vocabularies
            return Treatment(split(1), "head" if head else "matrix")
        if kernel and _GATHERS.search(leaf.owner):
            return Treatment(split(-1), "attention")
        if kernel and _SPREADS.search(leaf.owner):
            return Treatment(split(-fit.outputs if fit else 1), "attention")
        if fit and fit.outputs > 1:
            return Treatment(split(-fit.outputs), "projection")

        first = fit.first if fit else leaf.name.startswith("weight")
        named = bool(_CONVOLUTION.search(leaf.owner)) or len(core) > 3 or first
        if fit or (kernel and named):
            if core[1 if first else -2] == 1:
                return Treatment(None, "depthwise convolution")
            out = MatrixAxes(axes[batch + 1 :], axes[batch : batch + 1], axes[:batch])
            why = "convolution" if named else "projection"
            return Treatment(out if first else split(-1), why)
        squareness = lambda k: min(math.prod(core[:k]), math.prod(core[k:]))
        return Treatment(split(max(range(1, len(core)), key=squareness)), "squarest split")

    # Vectors and what they say ------------------------------------------------------------------

    def _is_vector(self, place: int) -> bool:
        """Whether a leaf is a bias or a scale, by name."""
        leaf = self.leaves[place]
        beside = self._modules[leaf.module]
        if _VECTOR.search(leaf.name) or place in self._batch_of_biases:
            return True
        if leaf.name == "weight" and "bias" in beside:  # of equinox's norms
            return self.leaves[beside["bias"]].shape == leaf.shape
        return leaf.name != "kernel" and bool(_NORM.search(leaf.owner))

    @cached_property
    def _modules(self) -> dict[Words, dict[str, int]]:
        """The places of every module's own leaves by their names."""
        modules: dict[Words, dict[str, int]] = {}
        for place, leaf in enumerate(self.leaves):
            modules.setdefault(leaf.module, {})[leaf.name] = place
        return modules

    @cached_property
    def _fits(self) -> dict[int, _Fit]:
        """What biases say about the kernels beside them."""
        return {kernel: fit for kernel, (_, fit) in self._pairs.items()}

    @cached_property
    def _batch_of_biases(self) -> dict[int, int]:
        """The number of batch axes of the biases of kernels."""
        return {bias: fit.batch for bias, fit in self._pairs.values()}

    @cached_property
    def _pairs(self) -> dict[int, tuple[int, _Fit]]:
        """Kernels with their bias and what it says."""
        found = {}
        for beside in self._modules.values():
            for name, kernel in beside.items():
                if not _KERNEL.search(name):
                    continue
                names = ["bias", "b" + name[1:] if name[0] in "wW" else "", *beside]
                for bias in dict.fromkeys(names):
                    known = bias in beside and (bias == names[1] or bias.startswith("bias"))
                    fits = _ways(self.leaves[kernel], self.leaves[beside[bias]]) if known else []
                    if fits:
                        found.setdefault(kernel, (beside[bias], fits[0]))
        return found

    def _said(self, place: int) -> int | None:
        """How many batch axes a vector says its module has."""
        leaf = self.leaves[place]
        if not leaf.shape:
            return 0
        if place in self._batch_of_biases:
            return self._batch_of_biases[place]
        lone = leaf.name.startswith("bias") and len(leaf.shape) > 1  # of whatever else
        beside = self._modules[leaf.module]
        norm = {"scale", "weight"} & beside.keys() or _NORM.search(leaf.owner)
        return len(leaf.shape) - 1 if self._is_vector(place) and (norm or not lone) else None

    # Batch axes ---------------------------------------------------------------------------------

    def _batch(self, place: int) -> int:
        """How many leading axes of a leaf are a batch."""
        if place in self._fits:
            return self._fits[place].batch
        leaf = self.leaves[place]
        batch = self._stacked[leaf.module]
        core = leaf.shape[batch:]
        if len(core) != 3:
            return batch
        words = (*leaf.module, leaf.name)
        experts = [i for i, word in enumerate(words) if _EXPERTS.search(word)]
        if experts and not any(word.isdigit() for word in words[experts[0] :]):  # no list of them
            return batch + 1
        square = core[1] == core[2] or _CONVOLUTION.search(leaf.owner)
        turned = (*leaf.shape[: batch + 1], core[2], core[1])
        near = [self.leaves[i].shape for i in self._inside[leaf.module[:-1]]]
        return batch + (not square and turned in near)

    @cached_property
    def _inside(self) -> dict[Words, list[int]]:
        """The places of all leaves of a module and of those inside it."""
        found: dict[Words, list[int]] = {}
        for place, leaf in enumerate(self.leaves):
            for k in range(len(leaf.module) + 1):
                found.setdefault(leaf.module[:k], []).append(place)
        return found

    @cached_property
    def _stacked(self) -> dict[Words, int]:
        """How many leading axes are a batch in all leaves of a module, by modules."""
        found: dict[Words, int] = {}
        for module in sorted(self._inside, key=len):
            before = found[module[:-1]] if module else 0
            found[module] = max(before, self._own_stack(module, before))
        return found

    def _own_stack(self, module: Words, before: int) -> int:
        """The same by the leaves of the module, where ``before`` are those of what it is in."""
        shapes = [self.leaves[i].shape for i in self._inside[module]]
        said = [x for x in map(self._said, self._inside[module]) if x is not None]
        batch = min(said, default=0)
        if not said and module and _STACK.search(module[-1]):
            batch = before + all(len(shape) > before + 2 for shape in shapes)
        shared = all(shape[:batch] == shapes[0][:batch] for shape in shapes)
        return batch if shared and min(map(len, shapes)) >= batch else 0

    @cached_property
    def _vocabularies(self) -> set[tuple[int, ...]]:
        """The sizes of the embeddings, also transposed, but for square ones."""
        named = [i for i, leaf in enumerate(self.leaves) if _is_embedding(leaf)]
        pairs = [self.leaves[i].shape[self._batch(i) :] for i in named]
        pairs = [pair for pair in pairs if len(pair) == len(set(pair)) == 2]
        return {shape for pair in pairs for shape in (pair, pair[::-1])}


_THIN = Treatment(None, "one row or column")


@lru_cache(maxsize=64)
def _tree(words: tuple[Words, ...], shapes: tuple[tuple[int, ...], ...]) -> Tree:
    """Made once for a tree: engines ask at every step."""
    pairs = zip(words, shapes, strict=True)
    return Tree(tuple(_Leaf(path[:-1], (path or ("",))[-1], shape) for path, shape in pairs))


def words_of(path: Any) -> Words:
    """A key path in words; a box of flax appends the name of its attribute, which is none."""
    keys = [
        next((getattr(key, n) for n in ("key", "name", "idx") if hasattr(key, n)), key)
        for key in path
    ]
    boxed = keys and keys[-1] in ("value", "raw_value")
    if boxed and isinstance(path[-1], jax.tree_util.GetAttrKey):
        keys = keys[:-1]
    return tuple(map(str, keys))


def _is_embedding(leaf: _Leaf) -> bool:
    """Whether a name says so: flax's of the array, equinox's of the module."""
    name = leaf.owner if leaf.name == "weight" else leaf.name
    other = _HEAD.search(name) or re.search("patch", name, re.IGNORECASE)
    return bool(_EMBEDDING.search(name)) and not other


def _ways(kernel: _Leaf, bias: _Leaf) -> list[_Fit]:
    """Every way in which a bias can belong to a kernel, the likeliest first."""
    k, b, found = kernel.shape, bias.shape, []
    if kernel.name.startswith("weight") and len(b) == len(k) - 1:
        window = next((i for i, n in enumerate(reversed(b[1:])) if n != 1), len(b) - 1)
        batch = len(b) - 1 - window  # equinox has (out, 1, 1) for a window of two axes
        if k[: batch + 1] == b[: batch + 1]:
            found.append(_Fit(batch, 1, True))
    for outputs in range(1, len(b) + 1) if len(k) > len(b) else ():
        batch = len(b) - outputs
        if k[:batch] == b[:batch] and k[-outputs:] == b[batch:]:
            found.append(_Fit(batch, outputs, False))
    if _SPREADS.search(kernel.owner):  # heads and their width
        found.sort(key=lambda fit: fit.outputs != 2)
    return found
