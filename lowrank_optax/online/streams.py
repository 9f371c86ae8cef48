"""From a model and a batch to vectors: what `learner` and the trackers take in.

Every function returns a tree whose leaves have a leading axis of ``k`` vectors, and works under
``jax.jit``. A model is a plain function of its parameters; `activations` alone takes flax modules,
because it reads what they compute inside.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import check, check_count


def gradients(
    loss_fn: Callable[[Any, Any], jax.Array], params: Any, batch: Any, parts: int = 1
) -> Any:
    r"""``k`` gradients, each of one part of a batch: ``v_i = \nabla L(params, part_i)``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> loss = lambda w, x: jnp.mean(x @ w)
      >>> print(lro.online.streams.gradients(loss, jnp.zeros(2), jnp.eye(4, 2), parts=2))
      [[0.5 0.5]
       [0.  0. ]]

    Args:
      loss_fn: function ``(params, part) -> scalar``.
      params: a tree of arrays, such as the state of an ``nnx`` model.
      batch: a tree whose leaves have a leading axis of ``n`` examples.
      parts: number ``k`` of parts, a divisor of ``n``, default 1.

    Returns:
      The parameters' tree with leaves ``(k, *shape)``.

    Raises:
      ValueError: for a number of parts that does not divide the batch.

    Cost: that of the gradient of the whole batch, one part at a time, and ``k d`` numbers.
    """
    check_count("gradients", "parts", parts)
    n = _length("gradients", batch)
    check(n % parts == 0, f"gradients: parts is {parts} for {n} examples; pass a divisor of {n}.")
    split = jax.tree.map(lambda x: jnp.reshape(x, (parts, n // parts, *jnp.shape(x)[1:])), batch)
    return jax.lax.map(lambda part: jax.grad(loss_fn)(params, part), split)


def per_example_gradients(
    loss_fn: Callable[[Any, Any], jax.Array], params: Any, batch: Any, chunk: int | None = None
) -> Any:
    r"""The gradient for every example: ``v_i = \nabla L(params, x_i)``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> loss = lambda w, x: (x @ w - 1.0) ** 2
      >>> print(lro.online.streams.per_example_gradients(loss, jnp.zeros(2), jnp.eye(2)))
      [[-2. -0.]
       [-0. -2.]]

    Args:
      loss_fn: function ``(params, example) -> scalar`` of one example without the batch's axis.
      params: a tree of arrays.
      batch: a tree whose leaves have a leading axis of ``k`` examples.
      chunk: number of examples that are differentiated at once, which bounds the memory of
        activations; default ``None``, all.

    Returns:
      The parameters' tree with leaves ``(k, *shape)``.

    Raises:
      ValueError: for a batch whose leaves have no leading axis, or different ones.

    Cost: that of the gradient of the batch, and ``k d`` numbers.
    """
    n = _length("per_example_gradients", batch)
    if chunk is not None:
        check_count("per_example_gradients", "chunk", chunk)
    gradient = lambda example: jax.grad(loss_fn)(params, example)
    return jax.lax.map(gradient, batch, batch_size=n if chunk is None else chunk)


def hessian_vector_products(loss_fn: Callable[[Any], jax.Array], params: Any, vectors: Any) -> Any:
    r"""``\nabla^2 L(params) v_i`` for every vector, forward over reverse.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> loss = lambda w: w[0] ** 2 + w[0] * w[1]
      >>> print(lro.online.streams.hessian_vector_products(loss, jnp.zeros(2), jnp.eye(2)))
      [[2. 1.]
       [1. 0.]]

    Args:
      loss_fn: function ``params -> scalar``; it closes over the batch.
      params: a tree of arrays.
      vectors: the parameters' tree with leaves ``(k, *shape)``.

    Returns:
      Products, shaped like ``vectors``.

    Raises:
      ValueError: for vectors that do not fit the parameters.

    Cost: about ``k`` times that of two gradients.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994.
    """
    _fits("hessian_vector_products", params, vectors)
    gradient = jax.grad(loss_fn)
    return jax.vmap(lambda v: jax.jvp(gradient, (params,), (v,))[1])(vectors)


def fisher_vector_products(
    model: Callable[[Any], Any],
    negative_log_likelihood: Callable[[Any], jax.Array],
    params: Any,
    vectors: Any,
) -> Any:
    r"""``J^T F J v_i`` for every vector: products with the Fisher or Gauss-Newton matrix.

    ``J`` is the Jacobian of the model's outputs, and ``F`` is the Hessian of the loss by the
    outputs. If the outputs are the natural parameters of an exponential family (logits of a
    softmax, means of a Gaussian), ``F`` is their Fisher matrix, whatever the labels are.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> x = jnp.array([[1., 0.], [2., 1.]])
      >>> gaussian = lambda y: 0.5 * jnp.sum((y - 3.) ** 2)
      >>> print(lro.online.streams.fisher_vector_products(
      ...     lambda w: x @ w, gaussian, jnp.zeros(2), jnp.eye(2)))
      [[5. 2.]
       [2. 1.]]

    Args:
      model: function ``params -> outputs``, any tree; it closes over the inputs.
      negative_log_likelihood: function ``outputs -> scalar``, such as the mean cross-entropy with
        the labels.
      params: a tree of arrays.
      vectors: the parameters' tree with leaves ``(k, *shape)``.

    Returns:
      Products, shaped like ``vectors``.

    Raises:
      ValueError: for vectors that do not fit the parameters.

    Cost: one forward pass with its linearisation, and for each vector a forward and a backward
    product.

    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent",
    Neural Computation 2002; Martens, "New insights and perspectives on the natural gradient
    method", JMLR 2020.
    """
    _fits("fisher_vector_products", params, vectors)
    outputs, forward = jax.linearize(model, params)
    backward = jax.linear_transpose(forward, params)
    middle = jax.linearize(jax.grad(negative_log_likelihood), outputs)[1]
    return jax.vmap(lambda v: backward(middle(forward(v)))[0])(vectors)


def sensitivities(function: Callable[[Any], Any], at: Any, tangents: Any) -> Any:
    r"""How outputs move along directions, in forward mode: ``v_i = J t_i``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> f = lambda x: jnp.array([x[0] * x[1], x[0]])
      >>> print(lro.online.streams.sensitivities(f, jnp.array([2., 3.]), jnp.eye(2)))
      [[3. 1.]
       [2. 0.]]

    Args:
      function: function of parameters or inputs to any tree of outputs.
      at: the point, a tree of arrays.
      tangents: the directions, the same tree with leaves ``(k, *shape)``.

    Returns:
      The outputs' tree with leaves ``(k, *shape)``.

    Raises:
      ValueError: for tangents that do not fit.

    Cost: about ``k + 1`` times that of the function, and no memory for a backward pass.
    """
    _fits("sensitivities", at, tangents)
    return jax.vmap(lambda t: jax.jvp(function, (at,), (t,))[1])(tangents)


def activations(
    model: Any,
    inputs: Any,
    variables: Any = None,
    where: Callable[[str], bool] = lambda path: True,
    **options: Any,
) -> dict[str, jax.Array]:
    """What the modules of a flax model put out for every example.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, lowrank_optax as lro
      >>> model, x = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)]), jnp.ones((5, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> found = lro.online.streams.activations(model, x, variables, lambda path: path != "")
      >>> print({path: v.shape for path, v in found.items()})
      {'layers_0': (5, 3), 'layers_2': (5, 2)}

    Args:
      model: a module of ``flax.linen`` or of ``flax.nnx``.
      inputs: the model's first argument, a batch of ``k`` examples.
      variables: variables of a ``linen`` module, as ``apply`` takes them; ``None``, the default,
        for ``nnx``.
      where: function of a module's path, such as ``"encoder/dense_0"``, that says whether to keep
        its outputs; the model's own path is ``""``. By default all are kept.
      **options: more arguments of ``apply``, or of an ``nnx`` model's call.

    Returns:
      Outputs ``(k, ...)`` by path. A module that is called several times, or returns a tree, has
      several: ``"path:0"``, ``"path:1"``.

    Raises:
      ValueError: where no output is kept.
      ImportError: for an ``nnx`` model without flax, or a flax that cannot capture outputs.

    Cost: one forward pass and what is kept; under ``jax.jit`` nothing after the last is computed.
    """
    if variables is not None:
        _, captured = model.apply(
            variables, inputs, capture_intermediates=True, mutable=["intermediates"], **options
        )
        outputs = captured["intermediates"]
    else:
        nnx = _nnx()
        capture = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
        _, captured = capture(inputs, **options)
        outputs = nnx.to_pure_dict(captured)
    found: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(outputs)[0]:
        names = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        if "__call__" not in names:
            continue  # sown by the model itself, or the output of another method
        name = "/".join(names[: names.index("__call__")])
        if where(name):
            found.setdefault(name, []).append(leaf)
    check(found, "activations: where keeps no output; pass a function true for some module's path.")
    return {
        name if len(leaves) == 1 else f"{name}:{i}": leaf
        for name, leaves in found.items()
        for i, leaf in enumerate(leaves)
    }


def _length(owner: str, batch: Any) -> int:
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
    check(
        len(lengths) == 1 and lengths != {()},
        f"{owner}: the batch's leaves have leading axes {sorted(lengths)}; pass leaves with one of "
        "the same length.",
    )
    return lengths.pop()[0]


def _fits(owner: str, at: Any, vectors: Any) -> None:
    same = jax.tree.structure(at) == jax.tree.structure(vectors)
    pairs = zip(jax.tree.leaves(at), jax.tree.leaves(vectors), strict=False)
    check(
        same and all(jnp.shape(x) == jnp.shape(v)[1:] and jnp.ndim(v) for x, v in pairs),
        f"{owner}: vectors of shapes {jax.tree.map(jnp.shape, vectors)} for "
        f"{jax.tree.map(jnp.shape, at)}; pass leaves (k, *shape).",
    )


def _nnx() -> Any:
    """``flax.nnx``, imported only where an ``nnx`` model came, as flax is an extra."""
    try:
        nnx = importlib.import_module("flax.nnx")
    except ImportError as error:
        raise ImportError("activations needs flax: pip install 'lowrank_optax[flax]'.") from error
    if not hasattr(nnx, "capture"):
        raise ImportError("activations of nnx models needs a flax with nnx.capture; upgrade flax.")
    return nnx
