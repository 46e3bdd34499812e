"""The vector field of a user as a function of packed states and explicit parameters, traced once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import Array

from jode.tree import Layout, State, is_inexact, merge, partition, programs_in, widest
from jode.tuning import PRODUCT, PRODUCTS, SMALL
from jode.window import Params

_SPY: ContextVar[Callable | None] = ContextVar("spy", default=None)


@contextmanager
def spied(spy: Callable) -> Iterator[None]:
    """Within this context vector fields of solves that are traced call spy(y) at every evaluation."""
    token = _SPY.set(spy)
    try:
        yield
    finally:
        _SPY.reset(token)


def heard(f: Callable) -> Callable:
    """The vector field that calls the spy of this context, if there is one."""
    spy = _SPY.get()
    return f if spy is None else _Spied(f, spy)


@dataclass(frozen=True)
class _Spied:
    f: Callable
    spy: Callable

    def __call__(self, t: Array, y: Any, args: Any) -> Any:
        self.spy(y)
        return self.f(t, y, args)


class Closed(NamedTuple):
    """Functions of (t, packed state, params): the slope; the state with what observers keep; the state after jump k, a fourth
    argument; the Jacobian, where it is given; what other observers look by; the state after an event's reset. And the effects of f,
    and how many equations it has: see `length`.
    """

    field: Callable
    kept: Callable | None
    jump: Callable | None
    jac: Callable | None
    looks: tuple
    resets: tuple
    effects: Any
    equations: int


def close(
    f: Callable,
    ts: Array,
    y0: Any,
    args: Any,
    layout: Layout,
    leading: list[bool],
    observing: bool,
    jump: Callable | None,
    jac: Callable | None,
    looks: Sequence[Callable | None],
    resets: Sequence[Callable] = (),
) -> tuple[Closed, Params, list]:
    """Trace f once: functions of packed states and explicit parameters, the parameters, and what the functions `looks` return.

    Arrays that f closes over are parameters too; `leading` says which leaves of args lead with depth. f must return the structure
    and shapes of y; another dtype is cast. Where there are observers beside the state, f returns besides the slope what they keep.
    """
    given, static = partition(args, jax.Array)
    time = ts.dtype
    lead = [m for x, m in zip(jax.tree.leaves(args), leading, strict=True) if isinstance(x, jax.Array)]
    example = [jax.eval_shape(lambda x: x[0], x) if m else _shape(x) for x, m in zip(given, lead, strict=True)]
    y = [jax.ShapeDtypeStruct(s, d) for s, d in zip(layout.shapes, layout.dtypes, strict=True)]
    buckets: tuple[list, list, list, list] = ([], [], [], [])

    def kept_in(xs: list, layered: list[bool]) -> list[tuple[int, int]]:
        """Places of arrays among the parameters."""
        places = []
        for x, by_layer in zip(xs, layered, strict=True):
            bucket = (0 if is_inexact(x) else 2) + by_layer
            places.append((bucket, len(buckets[bucket])))
            buckets[bucket].append(x)
        return places

    def traced(g: Callable, *numbers: Any, name: str = "f(t, y, args)") -> tuple[Callable, Any, Any]:
        """A function of (t, packed state, params, *numbers) that returns leaves; what g returns; what was traced."""

        def flat(t: Array, y: list, given: list, *numbers: Array) -> Any:
            return g(t, jax.tree.unflatten(layout.treedef, y), merge(given, static), *numbers)

        try:
            closed, out = jax.make_jaxpr(flat, return_shape=True)(jax.ShapeDtypeStruct((), time), y, example, *numbers)
        except (TypeError, ValueError, IndexError) as e:
            shapes = ", ".join(f"{d}{list(s)}" for s, d in zip(layout.shapes[:4], layout.dtypes, strict=False))
            e.add_note(f"jode called {name} with t a scalar and y0 of {shapes}; solve's own order is f, y0, ts, args")
            raise
        jaxpr = closed.jaxpr  # without its constants, which may be tracers
        jaxpr = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
        consts = kept_in([jnp.asarray(c) for c in closed.consts], [False] * len(closed.consts))
        function = _by_components(jaxpr)

        def evaluate(t: Array, state: State, params: Params, *numbers: Array) -> list:
            at = lambda places: [params[b][i] for b, i in places]
            return function([*at(consts), t, *layout.unpack(state), *at(places), *numbers])

        return evaluate, out, jaxpr

    def resetting(g: Callable, name: str, word: str, *numbers: Any) -> Callable:
        """The state that a function of the user makes of one, as a function of (t, packed state, params, *numbers)."""
        evaluate, out, _ = traced(g, *numbers, name=name)
        _check_slope(out, y0, layout, time, word)
        return lambda t, state, params, *numbers: packed(evaluate(t, state, params, *numbers))

    packed = lambda leaves: layout.pack([jnp.asarray(k, d) for k, d in zip(leaves, layout.dtypes, strict=True)])
    evaluate, out, jaxpr = traced(f)
    _check_slope(out[0] if observing else out, y0, layout, time)
    jumping = "the g of jumps, g(t, y, args), or g(t, y, args, x) where there are xs,"
    jumped = jump and resetting(jump, jumping, "g", jax.ShapeDtypeStruct((), jnp.int32))
    after = tuple(resetting(reset, "the reset(t, y, args) of an event", "reset") for reset in resets)
    jacobian = jac and _jacobian(*traced(jac, name="jac(t, y, args)")[:2], y0[0] if observing else y0, layout)
    looked = [g and traced(g, name="the g(t, y, args) of an observer") for g in looks]
    places = kept_in(given, lead)

    def field(t: Array, state: State, params: Params) -> State:
        return packed(evaluate(t, state, params)[: len(layout.dtypes)])

    def kept(t: Array, state: State, params: Params) -> State:
        after = evaluate(t, state, params)[len(layout.dtypes) :]
        return layout.pack([*layout.unpack(state)[: len(layout.dtypes) - len(after)], *after])

    def look(evaluate: Callable, out: Layout) -> Callable:
        cast = lambda leaves: [jnp.asarray(x, d) for x, d in zip(leaves, out.dtypes, strict=True)]
        return lambda t, state, params: out.pack(cast(evaluate(t, state, params)))

    outs = [x and Layout.of(x[1]) for x in looked]
    functions = tuple(x and look(x[0], Layout.of(x[1])) for x in looked)
    optional = (kept if observing else None, jumped, jacobian)
    closed = Closed(field, *optional, functions, after, jaxpr.effects, length(jaxpr))
    return closed, Params(*buckets), outs


def _shape(x: Array) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an argument; what was a Python number is one inside f too."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(jax.typeof(x), "weak_type", False))


def _by_components(jaxpr: Any) -> Callable:
    """A traced function, args -> list, in which the components of a short argument are parts of one `split`.

    Its transpose is one concatenation. That of y[0], y[1], y[0], … as they are written is a vector for each, padded with zeros,
    and their sum: the gradient of HIRES, which has 25, takes 1.6 ms so, and 7 ms otherwise, for 100 rows 0.4 and 1.0 ms each.
    """
    short = lambda x: len(x.aval.shape) == 1 and x.aval.shape[0] <= SMALL and is_inexact(x.aval)
    places = {x: i for i, x in enumerate(jaxpr.invars) if short(x)}
    of_one = lambda e: e.primitive.name == "slice" and e.invars[0] in places and e.outvars[0].aval.shape == (1,)
    taken, others = [e for e in jaxpr.eqns if of_one(e)], [e for e in jaxpr.eqns if not of_one(e)]
    rest = jaxpr.replace(invars=[*(e.outvars[0] for e in taken), *jaxpr.invars], eqns=others)
    where = [(places[e.invars[0]], e.params["start_indices"][0]) for e in taken]

    def evaluate(args: list) -> list:
        parts = {i: jax.lax.split(args[i], [1] * args[i].shape[0]) for i, _ in where}
        return jax.core.eval_jaxpr(rest, [], *(parts[i][j] for i, j in where), *args)

    return evaluate


def length(jaxpr: Any) -> int:
    """How many equations a traced function has, those of the functions it calls among them; a product counts -PRODUCT."""
    inner = [x for e in jaxpr.eqns for x in programs_in(e)]
    products = sum(e.primitive.name in PRODUCTS for e in jaxpr.eqns)
    return len(jaxpr.eqns) - (1 + PRODUCT) * products + sum(map(length, inner))


def jump_of(g: Callable, observing: bool, tabled: bool) -> Callable:
    """The state after jump k, as a function of (t, y, (args, xs), k); what observers keep stays."""

    def jump(t: Array, y: Any, args: tuple, k: Array) -> Any:
        args, xs = args
        y, kept = y if observing else (y, None)
        x = (jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, 0, keepdims=False), xs),) if tabled else ()
        y = g(t, y, args, *x)
        return (y, kept) if observing else y

    return jump


def _jacobian(evaluate: Callable, out: Any, y0: Any, layout: Layout) -> Callable:
    """∂f/∂y as a matrix over the packed components, from a function that gives it as `jax.jacfwd(f, 1)` does."""
    expected = jax.tree.map(lambda x: jax.tree.map(lambda z: (*x.shape, *z.shape), y0), y0)
    shapes = jax.tree.map(lambda x: x.shape, out)
    if shapes != expected:
        raise TypeError(f"jac(t, y, args) must return ∂f/∂y as jax.jacfwd(f, 1) does, with shapes {expected}; it returned {shapes}")
    if any(jnp.issubdtype(d, jnp.complexfloating) for d in layout.dtypes):
        raise TypeError(
            "jac(t, y, args) is for real states: of a complex one forward derivatives take real and imaginary parts apart"
        )
    given, sizes = len(jax.tree.leaves(y0)), [math.prod(shape) for shape in layout.shapes]
    order = [i for group in layout.groups for i in group]
    dtype = widest(*layout.dtypes, default=jnp.float32)

    def matrix(t: Array, state: State, params: Params) -> Array:
        blocks = evaluate(t, state, params)

        def block(i: int, j: int) -> Array:  # nothing depends on what observers keep, nor changes it
            within = max(i, j) < given
            return (
                blocks[given * i + j].reshape(sizes[i], sizes[j]).astype(dtype)
                if within
                else jnp.zeros((sizes[i], sizes[j]), dtype)
            )

        return jnp.block([[block(i, j) for j in order] for i in order])

    return matrix


def _check_slope(out: Any, y0: Any, layout: Layout, time: Any, name: str = "f") -> None:
    leaves, treedef = jax.tree.flatten(out)
    if treedef != layout.treedef:
        stateful = isinstance(out, tuple) and len(out) == 2 and jax.tree.structure(out[0]) == layout.treedef
        stateful = stateful and [x.shape for x in jax.tree.leaves(out[0])] == list(layout.shapes)
        hint = "; a pair of slope and state (batch statistics) is not a vector field: see jode.resnet" if stateful else ""
        if isinstance(out, (list, tuple)) and not stateful and jax.tree_util.treedef_is_leaf(layout.treedef):
            hint = f": y0 is one array, so make one of the {len(out)} entries with jnp.stack"
        raise TypeError(f"{name}(t, y, args) must return the structure of y0, {layout.treedef}; it returned {treedef}{hint}")
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(y0)[0]]
    for path, k, shape, dtype in zip(paths, leaves, layout.shapes, layout.dtypes, strict=True):
        if k.shape != shape:
            swapped = ": is it written f(y, t)? The order is t, y, args" if k.shape == () else ""
            raise TypeError(f"{name}(t, y, args){path} must have the shape of y0{path}, {shape}; it has {k.shape}{swapped}")
        if jnp.issubdtype(k.dtype, jnp.complexfloating) and not jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(f"{name}(t, y, args){path} is complex but y0{path} is {dtype}: make y0 complex")
        if is_inexact(k) and jnp.finfo(k.dtype).bits > max(32, *(jnp.finfo(d).bits for d in (dtype, time))):  # t may widen it
            warnings.warn(f"{name}(t, y, args){path} is {k.dtype} and is cast to the dtype of y0{path}, {dtype}", stacklevel=2)
