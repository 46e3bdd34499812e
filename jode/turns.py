"""A loop over many rows of which some want far more turns than others: all at once while most run, then the rest in groups.

In one loop over all rows each waits for the slowest. A CPU, which takes them one after the other, is spared that by moving the few
that are left side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.tuning import FEW_LEFT, GROUP


def in_groups(run: Callable[[Any, Any], Any], left: Array, carry: Any, data: Any) -> Any:
    """Finish the rows of the carry that are `left`, at most one in `FEW_LEFT`, by run(carry, data) for `GROUP` of them at a time.

    Every array of carry and data has its rows last.
    """
    size = jax.tree.leaves(carry)[0].shape[-1]
    most = -(-size // FEW_LEFT // GROUP) * GROUP
    index = jnp.arange(size, dtype=jnp.int32)
    which = jax.lax.sort(jnp.where(left.reshape(-1), index, size + index))[:most]  # compiles far sooner than jnp.nonzero

    def finish(k: Array, carry: Any) -> Any:
        here = jax.lax.dynamic_slice_in_dim(which, k * GROUP, GROUP)
        some = run(*jax.tree.map(lambda x: x.at[..., here].get(mode="clip"), (carry, data)))
        return jax.tree.map(lambda x, v: x.at[..., here].set(v, mode="drop", unique_indices=True), carry, some)

    return jax.lax.fori_loop(0, (jnp.sum(left) + GROUP - 1) // GROUP, finish, carry)
