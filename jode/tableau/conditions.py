"""Order conditions: what the coefficients of a method must satisfy for its order, one equation for each rooted tree.

A one-step method has order p if b · Φ(τ) = 1 / γ(τ) for every rooted tree τ of up to p vertices (Butcher; Hairer, Norsett & Wanner
I, section II.2). For Runge-Kutta methods Φ_i(τ) = Π_children Σ_j a_ij Φ_j(child). For Rosenbrock methods a vertex with one child
has β = α + Γ in the place of a, others α (Hairer & Wanner II, section IV.7).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache
from math import isfinite, prod
from typing import Any

import numpy as np

HIGHEST = 10  # orders that are looked at, of 1,205 trees in all
SLACK = 1e-10


@cache
def trees(order: int) -> tuple[tuple, ...]:
    """Rooted trees with so many vertices, each the sorted tuple of the trees below its root."""
    return tuple(sorted(set(_forests(order - 1, order - 1))))


@cache
def _forests(vertices: int, largest: int) -> tuple[tuple, ...]:
    """Sorted tuples of trees, none with more than `largest` vertices, that have so many in all."""
    if not vertices:
        return ((),)
    return tuple(
        tuple(sorted((t, *rest)))
        for n in range(1, min(vertices, largest) + 1)
        for t in trees(n)
        for rest in _forests(vertices - n, n)
    )


@cache
def _size(tree: tuple) -> int:
    return 1 + sum(map(_size, tree))


@cache
def density(tree: tuple) -> int:
    """γ(τ): the product of the sizes of a tree and of all trees in it."""
    return _size(tree) * prod(map(density, tree))


class Conditions:
    """The elementary weights Φ of a method's slopes, found tree by tree where they are asked for."""

    def __init__(self, alpha: np.ndarray, beta: np.ndarray | None = None) -> None:
        self.alpha, self.beta = alpha, alpha if beta is None else beta
        self.known: dict[tuple, np.ndarray] = {}

    def weights(self, tree: tuple) -> np.ndarray:
        """Φ(τ), one for each slope."""
        if tree not in self.known:
            matrix = self.beta if len(tree) == 1 else self.alpha
            self.known[tree] = prod((matrix @ self.weights(t) for t in tree), start=np.ones(len(matrix)))
        return self.known[tree]

    def holds(self, order: int, b: np.ndarray, exact: float = 1.0) -> bool:
        """Whether b · Φ(τ) = exact / γ(τ) for all trees with so many vertices."""
        found = np.array([b @ self.weights(t) for t in trees(order)])
        return bool(np.max(np.abs(found - [exact / density(t) for t in trees(order)])) <= SLACK * max(1.0, np.abs(b).sum()))

    def order(self, b: np.ndarray, most: int, theta: float = 1.0) -> int:
        """Up to which order, at most so many, h Σ b_i k_i is the change of the state over a fraction θ of the step."""
        return self._upto(most, lambda n: self.holds(n, b, theta**n))

    def vanishes(self, e: np.ndarray, most: int) -> int:
        """Up to which power of h, at most so many, h Σ e_i k_i is zero."""
        return self._upto(most, lambda n: self.holds(n, e, 0.0))

    @staticmethod
    def _upto(most: int, holds: Callable[[int], bool]) -> int:
        most = min(most, HIGHEST)
        return next((n - 1 for n in range(1, most + 1) if not holds(n)), most)


def claimed(name: str, what: str, order: int, found: int) -> None:
    """Refuse an order that the conditions do not bear out."""
    if min(order, HIGHEST) > found:
        raise ValueError(f"tableau {name}: {what}={order} is claimed, and the order conditions hold up to order {found}")


def as_floats(name: str, what: str, x: Any) -> Any:
    """Coefficients, of any type that Python's float takes, as floats in tuples."""
    if isinstance(x, (tuple, list)) or getattr(x, "ndim", 0):
        return tuple(as_floats(name, what, y) for y in x)
    try:
        number = float(x)
    except (TypeError, ValueError) as e:
        raise TypeError(f"tableau {name}: {what} must hold real numbers, got {x!r}") from e
    if not isfinite(number):
        raise ValueError(f"tableau {name}: {what} must hold finite numbers, got {x!r}")
    return number


def as_order(name: str, what: str, x: Any) -> int:
    """An order, which is a positive integer."""
    if isinstance(x, (bool, Fraction)) or int(x) != x or x < 1:
        raise ValueError(f"tableau {name}: {what} must be a positive int, got {x!r}")
    return int(x)
