"""Every tableau satisfies every rooted-tree condition up to its order, and no more than it says."""

from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import combinations_with_replacement

import jax.numpy as jnp
import numpy as np
import pytest

import jode
from jode import tableau as tb
from jode.tableau import conditions

TABLEAUS = {t.name: t for t in vars(tb).values() if isinstance(t, tb.Tableau)}
ROSENBROCK = {t.name: t for t in vars(tb).values() if isinstance(t, tb.RosenbrockTableau)}


@cache
def trees(order):
    """Rooted trees with `order` vertices, each the sorted tuple of its subtrees."""
    if order == 1:
        return [()]
    return sorted({tuple(sorted(forest)) for forest in forests(order - 1)})


@cache
def forests(vertices):
    if vertices == 0:
        return [()]
    return [(t, *rest) for n in range(1, vertices + 1) for t in trees(n) for rest in forests(vertices - n)]


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    return size(tree) * np.prod([density(t) for t in tree], initial=1.0)


def elementary(A, tree):
    """The elementary weights Φ_i of a tree at each stage."""
    out = np.ones(len(A))
    for t in tree:
        out = out * (A @ elementary(A, t))
    return out


def matrix(rows, n):
    A = np.zeros((n, n))
    for i, row in enumerate(rows):
        A[i, : len(row)] = row
    return A


def residual(A, b, order, theta=1.0):
    """The worst residual of the conditions b · Φ(τ) = θ^|τ| / γ(τ) over trees with exactly `order` vertices."""
    return max(abs(b @ elementary(A, t) - theta**order / density(t)) for t in trees(order))


def test_there_are_200_trees_to_order_8():
    assert sum(len(trees(n)) for n in range(1, 9)) == 200
    assert len(list(combinations_with_replacement("ab", 2))) == 3


@pytest.mark.parametrize("t", TABLEAUS.values(), ids=TABLEAUS)
def test_order_is_exactly_as_stated(t):
    A, b = matrix(t.a, t.stages), np.array(t.b)
    assert max(residual(A, b, n) for n in range(1, t.order + 1)) <= 2e-14
    assert residual(A, b, t.order + 1) > 1e-5


@pytest.mark.parametrize("t", TABLEAUS.values(), ids=TABLEAUS)
def test_rows_sum_to_their_nodes(t):
    sums = np.array([sum(row) for row in t.rows])
    assert np.abs(sums - t.nodes).max() <= 2e-15 * max(1, np.abs(matrix(t.rows, len(t.nodes))).max()) * len(t.nodes)


@pytest.mark.parametrize("t", [t for t in TABLEAUS.values() if t.adaptive], ids=lambda t: t.name)
def test_embedded_methods_have_the_order_they_state(t):
    A = matrix(t.rows[: t.stages + 1], t.stages + 1)
    b = np.array([*t.b, 0.0])
    orders = []
    for e in t.error:
        exact = [n for n in range(1, t.order + 2) if residual(A, b - np.array(e), n) > 1e-5]
        orders.append(min(exact) - 1)
    # The order-7 estimate of DOP853 is the combination of its estimates of order 5 and 3 (2·5 - 3).
    assert (orders == [t.embedded_order]) or (t.name == "dopri8" and orders == [5, 3] and t.embedded_order == 7)


@pytest.mark.parametrize("t", TABLEAUS.values(), ids=TABLEAUS)
@pytest.mark.parametrize("theta", [0.2, 0.63, 1.0])
def test_interpolants_have_the_order_they_state(t, theta):
    n = len(t.nodes)
    powers = theta ** np.arange(1, len(t.dense[0]) + 1)
    b = np.pad(np.array(t.dense) @ powers, (0, n - len(t.dense)))
    A = matrix(t.rows, n)
    assert max(residual(A, b, order, theta) for order in range(1, t.dense_order + 1)) <= 1e-12


@pytest.mark.parametrize("t", TABLEAUS.values(), ids=TABLEAUS)
def test_interpolants_pass_through_both_ends_with_both_slopes(t):
    rows = np.array(t.dense)
    at_one = rows.sum(1)
    slope = (rows * np.arange(1, rows.shape[1] + 1)).sum(1)
    start, end = np.zeros(len(rows)), np.zeros(len(rows))
    start[0], end[t.stages] = 1, 1
    assert np.abs(at_one - np.pad(t.b, (0, len(rows) - t.stages))).max() < 1e-12
    assert np.abs(rows[:, 0] - start).max() < 1e-12
    assert np.abs(slope - end).max() < 1e-11


def test_wrong_tableaus_are_refused():
    with pytest.raises(ValueError, match="sum to their nodes"):
        replace(tb.RK4, b=(1 / 6, 1 / 3, 1 / 3, 1 / 3))
    with pytest.raises(ValueError, match="rows of 0"):
        replace(tb.RK4, a=((), (0.5,), (0.5,), (0.0, 0.0, 1.0)))
    with pytest.raises(ValueError, match="end slope"):
        replace(tb.HEUN, error=((-0.5, 0.5),))


@pytest.mark.parametrize("t", [*TABLEAUS.values(), *ROSENBROCK.values()], ids=lambda t: t.name)
def test_orders_that_a_method_does_not_have_are_refused(t):
    """The error names what is claimed and what was found; a lower claim is no wrong one."""
    claims = {"order": t.order, "dense_order": t.dense_order}
    claims |= {"embedded_order": t.embedded_order} if t.embedded_order else {}
    for what, order in claims.items():
        with pytest.raises(ValueError, match=f"{t.name}: {what}={order + 1} is claimed, .* up to order {order}$"):
            replace(t, **{what: order + 1})
        assert order == 1 or getattr(replace(t, **{what: order - 1}), what) == order - 1
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="order must be a positive int"):
            replace(t, order=wrong)


def test_the_trees_of_the_package_are_those_of_this_file():
    for n in range(1, 9):
        assert set(conditions.trees(n)) == set(trees(n))
        assert all(conditions.density(t) == density(t) for t in trees(n))
    assert [len(conditions.trees(n)) for n in (9, 10)] == [286, 719]


def f(t, y, a):
    return jnp.sin(a * y) + t


NUMBERS = {
    "ints": lambda x: int(x) if x == int(x) else x,
    "fractions": lambda x: Fraction(x) if x == int(8 * x) / 8 else x,
    "numpy": np.float64,
    "numpy ints": lambda x: np.int32(x) if x == int(x) else np.float32(x) if float(np.float32(x)) == x else x,
    "arrays": np.asarray,
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_coefficients_may_be_any_numbers_and_any_sequences(kind):
    """A method is that of the same coefficients as floats: equal, hashable, with the same states."""

    def told(x):
        return list(map(told, x)) if isinstance(x, tuple) else NUMBERS[kind](x)

    names = {tb.RK4: "c a b", tb.HEUN: "c a b error dense", tb.ROSENBROCK23: "gamma c d a C b error dense"}
    for t, of_t in names.items():
        made = replace(t, order=np.int64(t.order), **{name: told(getattr(t, name)) for name in of_t.split()})
        assert made == t
        assert hash(made) == hash(t)
        method = jode.RungeKutta(made) if isinstance(made, tb.Tableau) else jode.Rosenbrock(made)
        assert np.isfinite(jode.odeint(f, jnp.ones(2), (0.0, 1.0), 1.3, solver=jode.Fixed(method, 3))).all()
    euler = jode.RungeKutta(tb.Tableau("euler", 1, c=(0,), a=((),), b=(1,)))
    assert euler == replace(jode.euler, tableau=replace(tb.EULER))


def test_coefficients_that_are_no_numbers_are_refused():
    with pytest.raises(TypeError, match="rk4: b must hold real numbers, got 'x'"):
        replace(tb.RK4, b=(1 / 6, 1 / 3, "x", 1 / 6))
    with pytest.raises(TypeError, match="gamma must hold real numbers, got 1j"):
        replace(tb.ROSENBROCK23, gamma=1j)
    with pytest.raises(ValueError, match="b must hold finite numbers, got nan"):
        replace(tb.RK4, b=(1 / 6, 1 / 3, np.nan, 1 / 6))
    with pytest.raises(TypeError, match=r"takes a jode\.tableau\.Tableau"):
        jode.RungeKutta(tb.RODAS5P)
    with pytest.raises(TypeError, match=r"takes a jode\.tableau\.RosenbrockTableau"):
        jode.Rosenbrock(tb.RK4)


def implicit(alpha, beta, tree):
    """The elementary weights Φ_i of a Rosenbrock method, whose slopes are linear in J: a vertex with one child counts with β = α + Γ, with
    more children with α (Hairer & Wanner II, section IV.7).
    """
    out = np.ones(len(alpha))
    for t in tree:
        out = out * ((beta if len(tree) == 1 else alpha) @ implicit(alpha, beta, t))
    return out


def misses(t, b, order, theta=1.0):
    """The worst residual of the conditions b · Φ(τ) = θ^|τ| / γ(τ) of a Rosenbrock method with weights b of its slopes."""
    alpha, gamma, _ = t.classical
    weights = b @ gamma
    return max(abs(weights @ implicit(alpha, alpha + gamma, tree) - theta**order / density(tree)) for tree in trees(order))


@pytest.mark.parametrize("t", ROSENBROCK.values(), ids=ROSENBROCK)
def test_rosenbrock_methods_have_exactly_the_order_they_state(t):
    b = np.array(t.b)
    assert max(misses(t, b, n) for n in range(1, t.order + 1)) < 1e-12
    assert misses(t, b, t.order + 1) > 1e-5
    compared = b - np.array(t.error)
    exact = min(n for n in range(1, 7) if misses(t, compared, n) > 1e-5) - 1
    assert min(exact, t.order) == t.embedded_order


@pytest.mark.parametrize("t", ROSENBROCK.values(), ids=ROSENBROCK)
@pytest.mark.parametrize("theta", [0.2, 0.63, 1.0])
def test_rosenbrock_interpolants_have_the_order_they_state(t, theta):
    b = np.array(t.dense) @ theta ** np.arange(1, len(t.dense[0]) + 1)
    assert max(misses(t, b, n, theta) for n in range(1, t.dense_order + 1)) < 1e-12


@pytest.mark.parametrize("t", ROSENBROCK.values(), ids=ROSENBROCK)
def test_rosenbrock_methods_are_l_stable(t):
    """|R(z)| ≤ 1 on the imaginary axis and R(∞) = 0, with R(z) = 1 + z b (I - z (α + Γ))⁻¹ 1."""
    alpha, gamma, b = t.classical
    R = lambda z: 1 + z * b @ np.linalg.solve(np.eye(t.stages) - z * (alpha + gamma), np.ones(t.stages))
    assert max(abs(R(1j * y)) for y in np.logspace(-3, 6, 2000)) <= 1 + 1e-9
    assert abs(R(-1e10)) < 1e-8


def test_explicit_methods_know_how_far_they_are_stable():
    limits = {"euler": 2.0, "heun": 2.0, "bosh3": 2.513, "rk4": 2.785, "dopri5": 3.307}
    for name, limit in limits.items():
        assert abs(TABLEAUS[name].stability - limit) < 0.02


def test_wrong_rosenbrock_tableaus_are_refused():
    with pytest.raises(ValueError, match="sum to c and d"):
        replace(tb.ROSENBROCK23, gamma=0.3)
    with pytest.raises(ValueError, match="3 weights need 3"):
        replace(tb.ROSENBROCK23, c=(0.0, 0.5))


def test_a_perturbed_coefficient_is_caught():
    t = tb.DOPRI5
    A = matrix(t.a, t.stages)
    A[3, 1] += 1e-10
    assert max(residual(A, np.array(t.b), n) for n in range(1, 6)) > 2e-14
