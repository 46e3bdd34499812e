"""Which times: solvers know their grid beforehand (`Fixed`, `Layers`) or find it while marching (`Adaptive`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array

from jode.method import Method, tsit5


class Status(IntEnum):
    """Why a trajectory ended. Anything but `success` comes with NaN from the failing time on."""

    success = 0
    max_steps = 1
    step_underflow = 2
    nonfinite_dynamics = 3
    nonfinite_state = 4
    invalid_input = 5


class Stats(NamedTuple):
    """What a solve cost, as int32 arrays, one number per trajectory.

    `nfe` counts evaluations of the vector field; `steps` = `accepted` + `rejected`. `nfe_backward` counts the evaluations
    that a gradient by the chosen adjoint takes besides: one per stage, each differentiated too, or two per stage for states of
    at most 32 components, of which one is differentiated; zero where it is not known (`Backsolve`).
    """

    nfe: Array
    steps: Array
    accepted: Array
    rejected: Array
    nfe_backward: Array


_static: Any = partial(field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fixed:
    """`steps` equal steps of `method` between consecutive save times.

    A Python int makes a pure `lax.scan`; an integer array (or a tracer) makes a loop whose length is data, so that changing
    it does not recompile. Global error O(h^p); cost `steps` × stages evaluations per interval. `max_steps` bounds a traced
    count where an adjoint must store every state. A traced count below 1 or above `max_steps` ends in `Status.invalid_input`.
    """

    method: Method = _static()
    steps: Any = 1
    max_steps: int | None = _static(default=None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layers:
    """One step of `method` for each slice along the leading axis of every array in `args`: a residual network.

    The N layers are divided evenly among the intervals between save times, so t runs over [ts[0], ts[-1]]: with
    `euler` and ts = (0, N) layer n is x + f(n, x, w_n), with ts = (0, 1) it is x + f(n/N, x, w_n) / N.

    `degree` is that of the weights as a piecewise polynomial of depth: with 0 a step sees one slice, with 1 the slices are the
    weights at the N nodes of N - 1 steps, and a stage sees the line between two of them: with `heun` the network of Sander,
    Ablin & Peyré 2022. Other leaves than floating ones are those of the step's first node.
    """

    method: Method = _static()
    degree: int = _static(default=0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adaptive:
    """Steps chosen so that the estimated local error stays below atol + rtol |y| (root mean square over the state).

    A PID controller sets the next step: h ← h · clip(safety · e^-(i+p+d)/q · e₋₁^(p+2d)/q · e₋₂^-d/q), e the scaled error
    and q the order of the estimate plus one; (p, i, d) = (0, 1, 0) is the classical controller. The first step is
    Hairer's (Hairer, Norsett & Wanner I, section II.4) unless given. Save times never force a step: states there are
    interpolated to the method's own quality. At most `max_steps` steps are tried. Tolerances below 4 ulp of the state's
    dtype are raised to that.
    """

    method: Method = _static(default=tsit5)
    rtol: Any = 1e-6
    atol: Any = 1e-6
    max_steps: int = _static(default=4096)
    first_step: Any = None
    pcoeff: float = _static(default=0.0)
    icoeff: float = _static(default=1.0)
    dcoeff: float = _static(default=0.0)
    safety: float = _static(default=0.9)
    factor_min: float = _static(default=0.2)
    factor_max: float = _static(default=10.0)
