"""What a program depends on besides its operands: the key under which it may be cached.

A program is traced once. What its functions close over, their defaults, the globals and the attributes that their code names, may
be bound anew before the next call: all these are part of the key, by identity, and what is immutable by value. Contents of lists,
tuples, dictionaries and sets are looked at too, and those of small arrays of NumPy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import jax
import jax.core
import numpy as np

from jode.tree import hashable

MOST = 4096  # objects that are looked at
SMALL = 4096  # bytes of an array of NumPy whose contents are

# Code of these packages does not change while a program runs: what it names is not looked up.
FIXED = frozenset(("builtins", "functools", "jax", "jaxlib", "jode", "math", "numpy", "equinox", "optax", "diffrax", "lineax"))

VALUES = (type(None), bool, int, float, complex, str, bytes)

CONTENTS: Any = (
    ((jax.Array, CodeType), lambda x: ()),
    (MethodType, lambda x: (x.__func__, x.__self__)),
    (functools.partial, lambda x: (x.func, *x.args, *x.keywords.values())),
    (dict, lambda x: x.values()),
    ((list, tuple, set, frozenset), tuple),
    (np.ndarray, lambda x: (x.tobytes(),) if x.nbytes <= SMALL and x.dtype != object else ()),
)


class Same:
    """An object as a key by its identity; it lives as long as the key."""

    __slots__ = ("of",)

    def __init__(self, of: Any) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return type(other) is Same and other.of is self.of

    def __hash__(self) -> int:
        return id(self.of)


def cached(f: Callable, static: tuple[int, ...]) -> Callable:
    """f jitted, some of its arguments static, with one more in front: (functions, a pytree), which f depends on.

    Where they hold tracers, or a static argument has no hash, f is called as it is. Where tracing changed what a function depends
    on (a field that counts its traces), what that has become stands for what it was.
    """
    traces, became = [0], {}

    def traced(*args: Any, key: Any) -> Any:
        traces[0] += 1
        return f(*args)

    traced.__name__ = f.__name__
    jitted = jax.jit(traced, static_argnums=static, static_argnames=("key",), inline=True)

    def call(depends: tuple, *args: Any) -> Any:
        functions, tree = depends
        (key, holds_tracers), types = dependencies(functions), types_in(jax.tree.structure(tree))
        if holds_tracers or not hashable(tuple(args[i] for i in static)):
            return f(*args)
        key = became.get((key, types), (key, types))
        before = traces[0]
        out = jitted(*args, key=key)
        if traces[0] != before and (after := (dependencies(functions)[0], types)) != key:
            if len(became) == MOST:
                became.clear()
            became[after] = key
        return out

    return call


def types_in(treedef: Any) -> tuple:
    """The types of the nodes of a pytree: treedefs of two dataclasses with the same fields compare equal."""
    node = treedef.node_data()
    return () if node is None else (node[0], *map(types_in, treedef.children()))


def dependencies(roots: Iterable[Any]) -> tuple[tuple, bool]:
    """A key of what some functions and objects depend on, and whether there are tracers in it: such a program is not cached."""
    walk = _Walk()
    for x in roots:
        walk.look_at(x)
    walk.finish()
    return tuple(walk.key), walk.traced


class _Walk:
    """Objects seen, in order; the names that code has used; and objects whose attributes are looked at if they are named."""

    def __init__(self) -> None:
        self.key: list = []
        self.seen: set[int] = set()
        self.names: dict[str, None] = {"__call__": None}
        self.owners: list[tuple[Any, set]] = []
        self.traced = False
        self.left: list = []

    def look_at(self, x: Any) -> None:
        self.left.append(x)
        while self.left:
            self._one(self.left.pop())

    def finish(self) -> None:
        """Look at attributes until no name leads to another."""
        before = -1
        while before != len(self.key):
            before = len(self.key)
            for owner, done in self.owners:
                for name in [n for n in self.names if n not in done]:
                    done.add(name)
                    for x in _attribute(owner, name):
                        self.look_at(x)

    def _one(self, x: Any) -> None:
        kind = type(x)
        if kind in VALUES:
            self.key.append((kind, x if kind not in (float, complex) else repr(x)))
        elif id(x) not in self.seen and len(self.seen) < MOST:
            self.seen.add(id(x))
            self.key.append(Same(x))
            self.left.extend(self._inside(x))

    def _inside(self, x: Any) -> Iterable[Any]:
        """What an object holds, whatever names code uses of it."""
        self.traced |= isinstance(x, jax.core.Tracer)
        if isinstance(x, FunctionType):
            return self._of_function(x)
        for kinds, contents in CONTENTS:
            if isinstance(x, kinds):
                return contents(x)
        fixed = _fixed(getattr(x, "__name__" if isinstance(x, ModuleType) else "__module__", None))
        if not fixed:
            self.owners.append((x, set()))
        if isinstance(x, (ModuleType, type)):
            return ()
        held = [y for y in getattr(x, "__dict__", {}).values() if callable(y)] if fixed else ()
        return *held, *(y for y in jax.tree.leaves(x) if isinstance(y, jax.core.Tracer)), getattr(x, "__wrapped__", None)

    def _of_function(self, f: FunctionType) -> Iterator[Any]:
        for cell in f.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not bound yet
                continue
        yield from f.__defaults__ or ()
        yield from (f.__kwdefaults__ or {}).values()
        if "__wrapped__" in f.__dict__:
            yield f.__dict__["__wrapped__"]
        if _fixed(f.__module__):  # whose globals do not change
            return
        for name in _names(f.__code__):
            self.names[name] = None
            if name in f.__globals__:
                yield f.__globals__[name]


def _attribute(owner: Any, name: str) -> Iterable[Any]:
    """What an attribute is, without calling anything: that of the object, else of its class."""
    spaces = [getattr(owner, "__dict__", {})]
    spaces += [c.__dict__ for c in (owner if isinstance(owner, type) else type(owner)).__mro__ if not _fixed(c.__module__)]
    for space in spaces:
        if name in space:
            x = space[name]
            if isinstance(x, property):
                return (x.fget,)
            if isinstance(x, (staticmethod, classmethod)):
                return (x.__func__,)
            if isinstance(x, MemberDescriptorType):  # a slot
                return (getattr(owner, name, None),)
            return (x,)
    return ()


def _fixed(module: str | None) -> bool:
    return (module or "").split(".", 1)[0] in FIXED


@functools.cache
def _names(code: CodeType) -> tuple[str, ...]:
    """The names that code uses, and functions inside of it."""
    inner = [n for c in code.co_consts if isinstance(c, CodeType) for n in _names(c)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))
