"""Wrong use fails when traced, names the argument, and says what to do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jode

Y0, TS = jnp.array([1.0, 2.0]), (0.0, 1.0)
f = lambda t, y, args: -y

WRONG = {
    "f second": (lambda: jode.solve(Y0, f, TS), TypeError, "y0 comes second"),
    "integer y0": (lambda: jode.solve(f, 1, TS), TypeError, "write 1.0 for 1"),
    "integer leaf": (lambda: jode.solve(f, {"a": jnp.arange(3)}, TS), TypeError, r"y0\['a'\]"),
    "string y0": (lambda: jode.solve(f, "abc", TS), TypeError, "y0 must be"),
    "scalar ts": (lambda: jode.solve(f, Y0, 1.0), ValueError, "at least two save times"),
    "one time": (lambda: jode.solve(f, Y0, (0.0,)), ValueError, "at least two save times"),
    "unsorted ts": (lambda: jode.solve(f, Y0, (0.0, 2.0, 1.0)), ValueError, "sort it"),
    "NaN time": (lambda: jode.solve(f, Y0, (0.0, np.nan)), ValueError, "ts must be finite"),
    "infinite start": (lambda: jode.solve(f, Y0, (-np.inf, 0.0, 1.0)), ValueError, "ts must be finite, or end in infinities"),
    "padding in front": (lambda: jode.solve(f, Y0, (0.0, np.inf, 1.0)), ValueError, "sort it"),
    "padding of the wrong sign": (lambda: jode.solve(f, Y0, (0.0, 1.0, -np.inf)), ValueError, "sort it"),
    "padding and NaN": (lambda: jode.solve(f, Y0, (0.0, 1.0, np.nan, np.inf)), ValueError, "ts must be finite"),
    "padded layers": (
        lambda: jode.solve(lambda t, y, w: w * y, Y0, (0.0, 1.0, np.inf), jnp.ones(4), solver=jode.Layers(jode.euler)),
        ValueError,
        "ts must be finite, got",
    ),
    "complex time": (lambda: jode.solve(f, Y0, (0.0, 1j)), TypeError, "ts must be real"),
    "a method for a solver": (lambda: jode.solve(f, Y0, TS, solver=jode.rk4), TypeError, r"write Fixed\(jode.rk4, steps\)"),
    "an adaptive method for a solver": (
        lambda: jode.solve(f, Y0, TS, solver=jode.tsit5),
        TypeError,
        r"write Adaptive\(jode.tsit5\)",
    ),
    "no embedded method": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(jode.rk4)), ValueError, "no embedded method"),
    "no steps": (lambda: jode.solve(f, Y0, TS, solver=jode.Fixed(jode.rk4, 0)), ValueError, "at least 1"),
    "steps and width": (lambda: jode.solve(f, Y0, TS, solver=jode.Fixed(jode.rk4, 1, width=0.1)), ValueError, "not both"),
    "no width of Fixed": (lambda: jode.solve(f, Y0, TS, solver=jode.Fixed(jode.rk4, width=0.0)), ValueError, "must be above zero"),
    "widths": (lambda: jode.solve(f, Y0, TS, solver=jode.Fixed(jode.rk4, width=Y0)), ValueError, "width must be a scalar"),
    "too many steps": (
        lambda: jode.solve(f, Y0, TS, solver=jode.Fixed(jode.rk4, width=0.1, max_steps=9)),
        ValueError,
        "makes 10 steps of an interval, more than 9",
    ),
    "steps 2.5": (lambda: jode.solve(f, Y0, TS, solver=jode.Fixed(jode.rk4, 2.5)), TypeError, "steps must be an int"),
    "zero tolerances": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(rtol=0.0, atol=0.0)), ValueError, "both zero"),
    "negative rtol": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(rtol=-1.0)), ValueError, "rtol must be"),
    "atol of another shape": (
        lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(atol=jnp.ones(3))),
        ValueError,
        r"atol has shape \(3,\) and must broadcast",
    ),
    "atol of more axes": (lambda: jode.solve(f, 1.0, TS, solver=jode.Adaptive(atol=jnp.ones(1))), ValueError, "must broadcast"),
    "atol of another structure": (
        lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(atol=[1e-6, 1e-3])),
        ValueError,
        "atol must be a number, or have the structure of y0",
    ),
    "negative leaf of atol": (
        lambda: jode.solve(f, {"a": 1.0, "b": Y0}, TS, solver=jode.Adaptive(atol={"a": 1e-6, "b": -Y0})),
        ValueError,
        r"atol\['b'\] must be finite and not negative",
    ),
    "a zero tolerance": (
        lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(rtol=0.0, atol=np.array([1e-6, 0.0]))),
        ValueError,
        "both zero",
    ),
    "norm 2": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(norm=2)), TypeError, "norm must be a function"),
    "norm of each": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(norm=lambda e: e)), TypeError, "must return a floating"),
    "no width": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(max_step=0.0)), ValueError, "max_step must be a width above"),
    "vector width": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(max_step=jnp.ones(2))), ValueError, "must be a scalar"),
    "no steps allowed": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(max_steps=0)), ValueError, "max_steps"),
    "adjoint class": (lambda: jode.solve(f, Y0, TS, adjoint=jode.Backprop), TypeError, "adjoint must be a value"),
    "no checkpoints": (lambda: jode.Backprop(0), ValueError, "positive int"),
    "None from f": (lambda: jode.solve(lambda t, y, a: None, Y0, TS), TypeError, "structure of y0"),
    "scalar from f": (lambda: jode.solve(lambda t, y, a: y[0], Y0, TS), TypeError, r"shape of y0, \(2,\); it has \(\)"),
    "wrong shape": (lambda: jode.solve(lambda t, y, a: y[None], Y0, TS), TypeError, r"\(1, 2\)"),
    "list from f": (lambda: jode.solve(lambda t, y, a: [y], Y0, TS), TypeError, "structure of y0"),
    "leaf of wrong shape": (
        lambda: jode.solve(lambda t, y, a: {"u": y["u"], "v": y["u"]}, {"u": Y0, "v": 1.0}, TS),
        TypeError,
        r"\['v'\]",
    ),
    "complex slope": (lambda: jode.solve(lambda t, y, a: y.astype(complex), Y0, TS), TypeError, "make y0 complex"),
    "unbounded store": (
        lambda: jax.grad(
            lambda y: jode.odeint(f, y, TS, solver=jode.Fixed(jode.rk4, jnp.asarray(3)), adjoint=jode.Backprop(None)).sum()
        )(Y0),
        ValueError,
        "max_steps=bound",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_refused_with_the_remedy(name):
    call, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        call()


def test_errors_of_the_vector_field_pass_through():
    class MineError(Exception):
        pass

    def bad(t, y, args):
        raise MineError("here")

    with pytest.raises(MineError, match="here"):
        jode.solve(bad, Y0, TS)


def test_a_wider_slope_is_cast_with_a_warning():
    with pytest.warns(UserWarning, match="cast to the dtype of y0"):
        sol = jode.solve(lambda t, y, a: -y.astype(float), jnp.ones(2, jnp.float32), TS)
    assert sol.ys.dtype == jnp.float32


def test_tolerances_below_the_dtype_are_raised_with_a_warning():
    with pytest.warns(UserWarning, match="below the resolution"):
        sol = jode.solve(f, jnp.ones(2, jnp.float32), TS, solver=jode.Adaptive(rtol=1e-12, atol=1e-12))
    assert sol.status == jode.Status.success


def test_integer_slopes_and_integer_times_are_right():
    y = jode.odeint(lambda t, y, a: jnp.array([2, 3]), Y0, (0, 2))
    np.testing.assert_allclose(y[-1], [5.0, 8.0], rtol=1e-12)


# --- save times padded by infinity

PADDED = np.array([[0.0, 0.5, 1.0, 2.0], [0.0, 0.7, np.inf, np.inf], [0.0, np.inf, np.inf, np.inf], [0.0, 0.1, 0.2, np.inf]])
COUNTS, STARTS = [4, 2, 1, 3], jnp.array([1.0, 2.0, 3.0, 0.5])
SOLVERS = {
    "fixed": jode.Fixed(jode.rk4, 5),
    "width": jode.Fixed(jode.heun, width=0.05, max_steps=99),
    "adaptive": jode.Adaptive(jode.tsit5, 1e-8, 1e-8),
    "implicit": jode.Adaptive(jode.rodas5p, 1e-6, 1e-6),
}
PADS = [("fixed", jode.Backprop()), ("adaptive", jode.Backprop(2)), ("adaptive", jode.Backsolve()), ("fixed", jode.MemoryFree())]
PADS += [("width", jode.MemoryFree()), ("width", jode.Backsolve()), ("implicit", jode.Backprop()), ("adaptive", jode.MemoryFree())]


def wave(t, y, a):
    return -a * y * jnp.cos(t)


@pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize(
    ("name", "adjoint"), [pytest.param(*p, marks=() if i < 4 else pytest.mark.sweep) for i, p in enumerate(PADS)]
)
def test_infinity_pads_save_times_of_rows_that_have_fewer(name, adjoint, sign):
    """States, gradients and forward derivatives are those of each row without its padding; what pads is NaN, and no failure."""
    run = lambda y, ts, a: jode.solve(wave, y, ts, a, solver=SOLVERS[name], adjoint=adjoint)
    ts, there, weights = sign * PADDED, np.isfinite(PADDED), jnp.arange(1.0, 5.0)[None]
    solve = lambda y, ts, a: jax.vmap(run, (0, 0, None))(y, ts, a)
    masked = lambda ys, ts: jnp.sum(weights * jnp.where(jnp.isfinite(ts), ys, 0) ** 2)
    loss = lambda y, ts, a: masked(solve(y, ts, a).ys, ts)
    moved = (jnp.ones(4), jnp.where(there, 0.5, 0.0), 1.0)

    @jax.jit
    def everything(y, ts, a):
        along = jax.jvp(loss, (y, ts, a), moved)[1]
        whole = jax.grad(lambda a: jnp.sum(solve(y, ts, a).ys))(a)  # of what is NaN
        return solve(y, ts, a), jax.grad(loss, (0, 1, 2))(y, ts, a), along, whole

    def truth(y, ts, a):
        grows = lambda t: jnp.exp(-a * jnp.sin(t))
        return masked(y[:, None] / grows(ts[:, :1]) * grows(jnp.where(there, ts, 0)), ts)

    sol, gradient, along, whole = everything(STARTS, ts, 1.3)
    error = 3e-3 if name == "width" else 1e-4
    np.testing.assert_array_equal(sol.status, jode.Status.success)
    np.testing.assert_array_equal(sol.reached, [t[n - 1] for t, n in zip(ts, COUNTS, strict=True)])
    np.testing.assert_array_equal(np.isfinite(sol.ys), there)
    np.testing.assert_array_equal(sol.ts, ts)
    for g, true in zip(gradient, jax.grad(truth, (0, 1, 2))(STARTS, ts, 1.3), strict=True):
        np.testing.assert_allclose(g, true, rtol=10 * error, atol=10 * error)
    assert (np.asarray(gradient[1])[~there] == 0).all()
    np.testing.assert_allclose(along, jax.jvp(truth, (STARTS, ts, 1.3), moved)[1], rtol=10 * error)
    assert np.isnan(whole)
    for i in (1, 2, 3):
        alone = run(STARTS[i], ts[i], 1.3)  # known when traced
        assert alone.status == jode.Status.success
        np.testing.assert_allclose(alone.ys, sol.ys[i], rtol=error)
        cut = run(STARTS[i], ts[i, : max(COUNTS[i], 2)] if i != 2 else (0.0, 0.0), 1.3).ys[: COUNTS[i]]
        np.testing.assert_allclose(cut, sol.ys[i, : COUNTS[i]], rtol=error if name == "width" else 1e-12)


@pytest.mark.parametrize("name", ["fixed", "adaptive"])
def test_what_happens_on_the_way_does_not_see_padding(name):
    """Stops, jumps, an event that ends, and observers, each row as without its padding."""
    observe = {"at": jode.At(jnp.array([0.05, 0.15]), lambda t, y, a: y), "hit": jode.Event(lambda t, y, a: y - 0.45)}
    jumps = (jnp.array([0.15, 0.6]), lambda t, y, a: y + a)

    def run(y, ts, a):
        return jode.solve(wave, y, ts, a, solver=SOLVERS[name], stops=[0.12], jumps=jumps, observe=observe)

    batch = jax.vmap(run, (0, 0, None))(STARTS, PADDED, 1.3)
    for i in (1, 3) if name == "fixed" else (3,):
        cut = run(STARTS[i], PADDED[i, : COUNTS[i]], 1.3)
        assert batch.status[i] == cut.status
        np.testing.assert_allclose(batch.reached[i], cut.reached, rtol=1e-12)
        for a, b in zip(jax.tree.leaves((batch.ys[i, : COUNTS[i]], jax.tree.map(lambda x: x[i], batch.observed))),
                        jax.tree.leaves((cut.ys, cut.observed)), strict=True):  # fmt: skip
            np.testing.assert_allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize("again", [jax.grad, pytest.param(jax.jacfwd, marks=pytest.mark.sweep)])
def test_second_derivatives_do_not_see_padding(again):
    last = lambda a, ts: jode.odeint(wave, 0.5, ts, a, solver=SOLVERS["fixed"])[2]
    twice = jax.jit(again(jax.grad(last)))
    np.testing.assert_allclose(twice(1.3, PADDED[3]), twice(1.3, PADDED[3, :3]), rtol=1e-9)


def test_traced_times_that_are_padded_wrongly_are_invalid_input():
    run = jax.jit(lambda ts, solver: jode.solve(f, Y0, ts, solver=solver))
    wrong = [(0.0, np.inf, 1.0), (0.0, 1.0, -np.inf), (np.inf, np.inf, np.inf), (0.0, 1.0, np.nan), (-np.inf, 0.0, 1.0)]
    sol = jax.vmap(lambda ts: run(ts, jode.Adaptive()))(jnp.array([*wrong, (0.0, 1.0, np.inf)]))
    np.testing.assert_array_equal(sol.status == jode.Status.invalid_input, [True] * 5 + [False])
    assert np.isnan(sol.ys[:5]).all()
    layers = jax.jit(lambda ts: jode.solve(lambda t, y, w: w * y, Y0, ts, jnp.ones(4), solver=jode.Layers(jode.euler)))
    assert layers(jnp.array([0.0, 1.0, np.inf])).status == jode.Status.invalid_input


@pytest.mark.parametrize("solver", [jode.Fixed(jode.rk4, 4), jode.Adaptive()], ids=["fixed", "adaptive"])
def test_a_solution_has_the_dtypes_and_shapes_of_its_annotations(solver):
    fall = lambda t, y, args: jax.tree.map(lambda x: -x, y)
    sol = jode.solve(fall, {"a": Y0, "b": jnp.array(1j)}, jnp.array([0.0, 1.0, 3.0]), solver=solver)
    names = {**vars(jaxtyping), "PyTree": jaxtyping.PyTree, "Array": jax.Array, "Stats": jode.Stats, "Any": object}
    with jaxtyping.jaxtyped("context"):  # `saves` is one number
        for value in (sol, sol.stats):
            for name, note in type(value).__annotations__.items():
                assert isinstance(getattr(value, name), eval(getattr(note, "__forward_arg__", note), names)), name


class Rate:
    """A field that is an object."""

    k = 1.0
    __slots__ = ("__dict__", "slot")

    def f(self, t, y, args):
        return -self.k * y

    def by_slot(self, t, y, args):
        return -self.slot * y

    def __call__(self, t, y, args):
        return self.f(t, y, args)


RATE, TABLE, ARRAY = 1.0, {"k": [1.0]}, np.ones(1)


def by_global(t, y, args):
    return -RATE * y


def by_default(t, y, args, k=1.0):
    return -k * y


def changes():
    """Fields of rate 1, each with what makes its rate 2."""
    rate, other, owner, sloted = Rate(), Rate(), Rate(), Rate()
    sloted.slot = 1.0
    k = 1.0

    def closed(t, y, args):
        return -k * y

    def bind():
        nonlocal k
        k = 2.0

    yield "method", rate.f, lambda: setattr(rate, "k", 2.0)
    yield "callable object", other, lambda: setattr(other, "k", 2.0)
    yield "slot", sloted.by_slot, lambda: setattr(sloted, "slot", 2.0)
    yield "method of a class", owner, lambda: setattr(owner, "f", lambda t, y, args: -2.0 * y)
    yield "closure", closed, bind
    yield "global", by_global, lambda: globals().update(RATE=2.0)
    yield "contents", lambda t, y, args: -TABLE["k"][0] * y, lambda: TABLE["k"].__setitem__(0, 2.0)
    yield "default", by_default, lambda: setattr(by_default, "__defaults__", (2.0,))
    yield "array of NumPy", lambda t, y, args: -ARRAY[0] * y, lambda: ARRAY.fill(2.0)
    yield "partial", functools.partial(lambda table, t, y, args: -table["k"] * y, table := {"k": 1.0}), lambda: table.update(k=2.0)


def test_a_field_that_changed_is_not_solved_as_it_was():
    solver = jode.Fixed(jode.rk4, 8)
    at = lambda f: float(jode.odeint(f, 1.0, TS, solver=solver)[-1])
    for name, f, change in changes():
        assert at(f) == pytest.approx(np.exp(-1.0), abs=1e-4), name
        change()
        assert at(f) == pytest.approx(np.exp(-2.0), abs=2e-3), name


def test_a_function_of_an_event_that_changed_too():
    level = 0.5

    def g(t, y, args):
        return y - level

    when = lambda: float(jode.solve(lambda t, y, args: -y, 1.0, TS, observe=jode.Event(g)).observed.t)
    assert when() == pytest.approx(np.log(2.0), abs=1e-5)
    level = 0.8
    assert when() == pytest.approx(-np.log(0.8), abs=1e-5)


def dataclass_like(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@dataclass_like
class Half(jode.Fixed):
    """Steps of half the width."""

    def span(self, march, problem, a, b, k):
        t, h = super().span(march, problem, a, b, k)
        return t, h / 2


@dataclass_like
class Decay:
    k: float

    def rate(self):
        return self.k


@dataclass_like
class Twice(Decay):
    def rate(self):
        return 2 * self.k


def test_values_of_two_types_with_the_same_fields_are_two_values():
    """JAX takes treedefs of two registered dataclasses with the same fields for equal."""
    at = lambda of, solver=jode.Fixed(jode.rk4, 8): float(
        jode.odeint(lambda t, y, args: -args.rate() * y, 1.0, TS, of, solver=solver)[-1]
    )
    for _ in range(2):
        assert at(Decay(1.0)) == pytest.approx(np.exp(-1.0), abs=1e-4)
        assert at(Twice(1.0)) == pytest.approx(np.exp(-2.0), abs=2e-3)
        assert at(Decay(1.0), Half(jode.rk4, 8)) == pytest.approx(np.exp(-0.5), abs=1e-4)
    state = lambda of: jode.odeint(
        lambda t, y, args: jax.tree.map(lambda x: -y.rate() * x, y), of, TS, solver=jode.Fixed(jode.rk4, 8)
    ).k[-1]
    first, second = state(Decay(jnp.array(1.0))), state(Twice(jnp.array(1.0)))
    assert first == pytest.approx(1 / 2, abs=1e-4)
    assert second == pytest.approx(1 / 3, abs=1e-3)
