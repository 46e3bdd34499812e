"""Universal differential equations, known physics plus a network, and multiple shooting to fit them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

import jode


class Universal(eqx.Module):
    """dy/dt = known(t, y, constants) + N(y / scale), N a perceptron: what is known is written, the rest is learned (Rackauckas et
    al. 2020).

    The last layer of N starts at a tenth of its size, so that training starts near the known part.

    Args:
        known: (t, y, constants) -> dy/dt, the known part.
        constants: its parameters, any pytree. Arrays among them are trained with the network, which can then trade with them
            whatever it can express itself; Python numbers are not trained.
        size: D, of the state.
        width: of the hidden layers.
        depth: how many of them.
        scale: typical sizes of the states, a number or (D,); not trained.
        activation: of the hidden layers.
        key: a PRNG key.
    """

    known: Callable = eqx.field(static=True)
    constants: Any
    network: eqx.nn.MLP
    scale: tuple[float, ...] = eqx.field(static=True)

    def __init__(
        self,
        known: Callable,
        constants: Any,
        size: int,
        *,
        width: int = 16,
        depth: int = 2,
        scale: float | tuple[float, ...] = 1.0,
        activation: Callable = jnp.tanh,
        key: Array,
    ):
        self.known, self.constants = known, constants
        network = eqx.nn.MLP(size, size, width, depth, activation=activation, key=key)
        last: Any = network.layers[-1]
        self.network = eqx.tree_at(lambda n: n.layers[-1].weight, network, last.weight / 10)
        self.scale = (float(scale),) * size if isinstance(scale, int | float) else tuple(float(s) for s in scale)

    def unknown(self, y: Array) -> Array:
        """What the network adds: N(y / scale), (D,)."""
        return self.network(y / jnp.asarray(self.scale, y.dtype))

    @staticmethod
    def field(t: Array, y: Array, model: Universal) -> Array:
        """The vector field, with the module as args: jode.solve(Universal.field, y0, ts, model)."""
        return model.known(t, y, model.constants) + model.unknown(y)


class Shots(NamedTuple):
    """What multiple shooting found: states at all save times, and by how much each segment's end misses the next one's start."""

    ys: Any
    gaps: Any


def multiple_shooting(
    f: Callable,
    starts: Any,
    ts: Array,
    args: Any = None,
    *,
    solver: Any = jode.Adaptive(),
    adjoint: Any = jode.Backprop(),
) -> Shots:
    """Solve on S segments of the save times at once, each from a start of its own (Bock & Plitt 1984; van Domselaar & Hemker 1975).

    Segment k covers the times t_{km}, …, t_{(k+1)m}, m = (T - 1) / S, so neighbours share a time. The starts are parameters. A
    trajectory is a solution of the whole where all gaps vanish; a loss

        misfit(ys) + weight Σ gaps²

    joins them as far as the weight says. Each solve is short, so the loss has fewer false minima in the parameters than one over
    the whole time, and a state that runs away at a poor guess does so in one segment alone. With S = 1 this is single shooting.

    Args:
        f: the vector field.
        starts: states at t_0, t_m, t_{2m}, …, a pytree like y with a leading axis S.
        ts: save times (T,), T - 1 a multiple of S.
        args: of f.
        solver: of each segment.
        adjoint: how gradients are computed.

    Returns:
        `Shots`: ys with a leading axis T, where a shared time has the state of the segment that starts there, and gaps with a
        leading axis S - 1. Cost: as one solve through ts, the segments beside each other as a batch.

    Raises:
        ValueError: where S does not divide T - 1, or the starts disagree about S.
        TypeError, ValueError: what `jode.solve` raises, when traced.
    """
    sizes = {jnp.shape(x)[0] if jnp.ndim(x) else None for x in jax.tree.leaves(starts)}
    count = sizes.pop() if len(sizes) == 1 else None
    if not count:
        raise ValueError("multiple_shooting: every leaf of starts needs the same leading axis, one state a segment")
    length, rest = divmod(ts.shape[0] - 1, count)
    if rest or not length:
        raise ValueError(f"multiple_shooting: {count} segments do not divide the {ts.shape[0] - 1} intervals of ts evenly")
    rows = length * jnp.arange(count)[:, None] + jnp.arange(length + 1)[None]
    paths = jax.vmap(lambda y, ts: jode.odeint(f, y, ts, args, solver=solver, adjoint=adjoint))(starts, ts[rows])

    def joined(path: Array) -> Array:
        return jnp.concatenate([path[:, :-1].reshape(-1, *path.shape[2:]), path[-1, -1:]])

    gaps = jax.tree.map(lambda path, start: path[:-1, -1] - start[1:], paths, starts)
    return Shots(jax.tree.map(joined, paths), gaps)
