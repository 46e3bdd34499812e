"""A loop over many rows of which some want far more turns than others: all at once while most run, then the rest in groups.

In one loop over all rows each waits for the slowest. A CPU, which takes them one after the other, is spared that by moving the few
that are left side by side. An accelerator runs all rows at once and has nothing to gain from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.batch import Rows

GROUP = 512  # rows whose stages fit the cache of a CPU
MANY = 8 * GROUP
FEW = 8  # the rest is grouped when one row in so many is left


def groups(rows: Rows) -> Rows | None:
    """The rows of one group, where there are many, they lie last, and a CPU runs them."""
    many = rows.size is not None and rows.axis == -1 and rows.size >= MANY
    return Rows(GROUP, -1) if many and jax.default_backend() == "cpu" else None


def in_groups(run: Callable[[Any, Any], Any], left: Array, carry: Any, data: Any) -> Any:
    """Finish the rows of the carry that are `left`, at most one in `FEW`, by run(carry, data) for `GROUP` of them at a time.

    Every array of carry and data has its rows last.
    """
    size = jax.tree.leaves(carry)[0].shape[-1]
    most = -(-size // FEW // GROUP) * GROUP
    index = jnp.arange(size, dtype=jnp.int32)
    which = jax.lax.sort(jnp.where(left.reshape(-1), index, size + index))[:most]  # compiles far sooner than jnp.nonzero

    def finish(k: Array, carry: Any) -> Any:
        here = jax.lax.dynamic_slice_in_dim(which, k * GROUP, GROUP)
        some = run(*jax.tree.map(lambda x: x.at[..., here].get(mode="clip"), (carry, data)))
        return jax.tree.map(lambda x, v: x.at[..., here].set(v, mode="drop", unique_indices=True), carry, some)

    return jax.lax.fori_loop(0, (jnp.sum(left) + GROUP - 1) // GROUP, finish, carry)
