"""Drop-in for `jax.experimental.ode`: its signature, with every derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.flatten_util import ravel_pytree

from jode.control import Adaptive
from jode.ivp import odeint as _odeint
from jode.method import dopri5


def odeint(
    func: Callable,
    y0: Any,
    t: Any,
    *args: Any,
    rtol: Any = 1.4e-8,
    atol: Any = 1.4e-8,
    mxstep: float = math.inf,
    hmax: Any = math.inf,
) -> Any:
    """The states at the times t of dy/dt = func(y, t, *args), y(t[0]) = y0, by Dopri5.

    Args:
        func: the vector field, called with the state first. What it returns may have another structure than the state: its
            components are taken in order.
        y0: the initial state, any pytree of arrays.
        t: the times, at least two; t[0] is the initial one.
        args: further arguments of func, pytrees.
        rtol: relative tolerance.
        atol: absolute tolerance.
        mxstep: at most so many steps are tried, between all times together; without a bound 65,536. What is not reached is NaN.
        hmax: no step is wider than this.

    Returns:
        A pytree like y0 with a leading axis for the times. Gradients are exact, of any order and in both modes.

    Raises:
        ValueError: for an hmax that is not above zero.
    """
    most = None if isinstance(hmax, float) and hmax == math.inf else hmax
    solver = Adaptive(dopri5, rtol, atol, max_steps=65536 if mxstep == math.inf else int(mxstep), max_step=most)

    def field(t: Array, y: Any, args: tuple) -> Any:
        slope = func(y, t, *args)
        if jax.tree.structure(slope) == jax.tree.structure(y):
            return slope
        flat, unravel = ravel_pytree(y)
        return unravel(ravel_pytree(slope)[0].astype(flat.dtype))

    return _odeint(field, y0, t, args, solver=solver)
