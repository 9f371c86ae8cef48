"""How often jax traced a function; the size of jit's own cache depends on what else has run."""

from typing import Any

import jax


class Traced:
    """`jax.jit` of a function that counts how often it is traced."""

    def __init__(self, function: Any, **options: Any):
        self.count = 0

        def counted(*args: Any, **kwargs: Any):
            self.count += 1
            return function(*args, **kwargs)

        self.compiled = jax.jit(counted, **options)

    def __call__(self, *args: Any, **kwargs: Any):
        return self.compiled(*args, **kwargs)
