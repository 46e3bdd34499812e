"""Ways to run a loop: compiled, or step by step in Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Runner:
    """Loops whose carry is any pytree; bodies get the count as an int32."""

    def repeat(self, n: Any, body: Callable[[Any, Any], tuple[Any, Any]], carry: Any) -> tuple[Any, Any]:
        """body(k, carry) -> (carry, out) for k = 0 … n - 1; the last carry, and the outs stacked. Where n is data there are
        none, and n may be 0.
        """
        raise NotImplementedError

    def until(self, done: Callable[[Any], Array], body: Callable[[Any], Any], carry: Any) -> Any:
        """body(carry) -> carry until done(carry)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Compiled(Runner):
    """`jax.lax.scan` for a Python int, which JAX differentiates in both modes, and loops whose length is data otherwise."""

    def repeat(self, n: Any, body: Callable[[Any, Any], tuple[Any, Any]], carry: Any) -> tuple[Any, Any]:
        if not isinstance(n, int):
            return jax.lax.fori_loop(0, n, lambda k, c: body(jnp.asarray(k, jnp.int32), c)[0], carry), None
        if n == 1:
            carry, out = body(np.int32(0), carry)
            return carry, jax.tree.map(lambda x: x[None], out)

        def counted(c: tuple, _: None) -> tuple[tuple, Any]:  # a scan over arange(n) would keep its n integers
            k, carry = c
            carry, out = body(k, carry)
            return (k + 1, carry), out

        (_, carry), outs = jax.lax.scan(counted, (jnp.zeros((), jnp.int32), carry), None, length=n)
        return carry, outs

    def until(self, done: Callable[[Any], Array], body: Callable[[Any], Any], carry: Any) -> Any:
        return jax.lax.while_loop(lambda c: ~done(c), body, carry)


@dataclass(frozen=True)
class Eager(Runner):
    """Loops in Python, for values that are known (under `jax.disable_jit`): a debugger stops inside f."""

    def repeat(self, n: Any, body: Callable[[Any, Any], tuple[Any, Any]], carry: Any) -> tuple[Any, Any]:
        outs = []
        for k in range(int(n)):
            carry, out = body(jnp.asarray(k, jnp.int32), carry)
            outs.append(out)
        return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *outs) if outs else None

    def until(self, done: Callable[[Any], Array], body: Callable[[Any], Any], carry: Any) -> Any:
        while not done(carry):
            carry = body(carry)
        return carry
