"""Where functions of the state cross zero, and what they are at given times: right in value and in every derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode

FINE = jode.Adaptive(jode.tsit5, 1e-12, 1e-12)
SOLVERS = {
    "tsit5": FINE,
    "dopri8": jode.Adaptive(jode.dopri8, 1e-12, 1e-12),
    "fixed": jode.Fixed(jode.dopri8, 60),
}


def fall(t, y, g):
    return jnp.stack([y[1], -g])


def below(t, y, g):
    return y[0]


GROUND = jode.Event(below, direction=-1)


def landing(g, h, v, solver=FINE, adjoint=jode.Backprop(), ts=(0.0, 0.3, 3.0)):
    return jode.solve(fall, jnp.stack([h, v]), ts, g, solver=solver, adjoint=adjoint, observe=GROUND)


def time_of_landing(g, h, v):
    return (v + jnp.sqrt(v * v + 2 * g * h)) / g


ADJOINTS = {"stored": jode.Backprop(None), "recomputed": jode.Backprop(4), "memory-free": jode.MemoryFree()}
DAILY = [*(("tsit5", adjoint) for adjoint in ADJOINTS), ("dopri8", "stored"), ("fixed", "memory-free")]


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        pytest.param(SOLVERS[s], ADJOINTS[a], id=f"{s}-{a}", marks=[] if (s, a) in DAILY else [pytest.mark.sweep])
        for s in SOLVERS
        for a in ADJOINTS
    ],
)
def test_a_ball_lands_when_and_as_it_should(solver, adjoint):
    x = (9.81, 1.0, 2.0)
    sol = jode.check(landing(*x, solver, adjoint))
    assert sol.status == jode.Status.event
    assert sol.observed.count == 1
    exact = time_of_landing(*x)
    np.testing.assert_allclose(sol.observed.t, exact, rtol=0, atol=1e-10)
    np.testing.assert_allclose(sol.observed.y, [0.0, -jnp.sqrt(4 + 2 * 9.81)], rtol=0, atol=1e-9)
    np.testing.assert_allclose(sol.reached, exact, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(np.isnan(sol.ys[:, 0]), [False, False, True])

    @jax.jit
    def slopes(*x):
        """Of the time and of the speed: in reverse mode one after the other, and in forward mode."""
        crossing = lambda *x: jnp.stack([(c := landing(*x, solver, adjoint).observed).t, c.y[1]])
        _, back = jax.vjp(crossing, *x)
        return [back(one) for one in jnp.eye(2)], jax.jacfwd(crossing, (0, 1, 2))(*x)

    (got, forward), speed = slopes(*x), lambda g, h, v: -jnp.sqrt(v * v + 2 * g * h)
    want = jax.jit(lambda *x: [jax.grad(f, (0, 1, 2))(*x) for f in (time_of_landing, speed)])(*x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-8)
    np.testing.assert_allclose(got, np.transpose(forward), rtol=1e-9, atol=1e-9)


def test_second_derivatives_of_a_time():
    x = (9.81, 1.0, 2.0)
    got = jax.jit(jax.jacfwd(jax.grad(lambda *x: landing(*x).observed.t, (0, 1, 2)), (0, 1, 2)))(*x)
    want = jax.jit(jax.hessian(time_of_landing, (0, 1, 2)))(*x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-8), got, want)


def test_ten_bounces_by_the_users_scan():
    e, g = 0.8, 9.81

    def bounce(carry, _):
        t, v = carry
        hit = jode.solve(fall, jnp.stack([jnp.zeros(()), v]), (0.0, 3.0), g, solver=FINE, observe=GROUND).observed
        return (t + hit.t, -e * hit.y[1]), t + hit.t

    _, times = jax.jit(lambda v: jax.lax.scan(bounce, (jnp.zeros(()), v), None, length=10))(jnp.float64(5.0))
    exact = np.cumsum(2 * 5.0 * e ** np.arange(10) / g)
    np.testing.assert_allclose(times, exact, rtol=0, atol=1e-10)


def test_rows_stop_at_times_of_their_own_or_never_and_losses_may_mask_them():
    decay = lambda t, y, k: -k * y
    k, level = jnp.array([0.2, 1.0, 3.0, 0.01]), jode.Event(lambda t, y, k: y - 0.5)

    times = jax.vmap(lambda k: jode.solve(decay, 1.0, (0.0, 5.0), k, solver=FINE, observe=level))
    sol = jax.jit(times)(k)
    np.testing.assert_array_equal(sol.observed.count, [1, 1, 1, 0])
    np.testing.assert_array_equal(sol.status, [jode.Status.event] * 3 + [jode.Status.success])
    np.testing.assert_allclose(sol.observed.t, [*(np.log(2) / k[:3]), np.nan], rtol=0, atol=1e-10)
    assert np.isfinite(sol.ys[3]).all()
    assert np.isnan(sol.observed.y[3])

    def loss(k):
        hit = times(k).observed
        return jnp.sum(jnp.where(hit.count > 0, jnp.where(hit.count > 0, hit.t, 0.0), 0.0))

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(k), [*(-np.log(2) / k[:3] ** 2), 0.0], rtol=1e-8, atol=1e-9)
    shared = jax.jit(jax.grad(lambda s: loss(s * k)))(1.0)
    np.testing.assert_allclose(shared, -np.sum(np.log(2) / k[:3]), rtol=1e-8)


def test_crossings_that_end_nothing_are_kept_up_to_a_number():
    oscillator = lambda t, y, w: jnp.stack([y[1], -w * w * y[0]])
    rising, all_ = (jode.Event(lambda t, y, w: y[0], d, terminate=False, most=6) for d in (1, 0))
    solver = jode.Adaptive(jode.tsit5, 1e-12, 1e-12)

    def seen(w):
        sol = jode.solve(oscillator, jnp.array([1.0, 0.0]), (0.0, 10.0), w, solver=solver, observe={"rising": rising, "all": all_})
        assert sol.ys.shape == (2, 2)
        return sol.observed

    out = jax.tree.map(np.array, seen(1.0))
    np.testing.assert_allclose(out["rising"].t[:2], [1.5 * np.pi, np.nan], atol=1e-9)
    assert out["rising"].count == 1
    np.testing.assert_allclose(out["all"].t, [0.5 * np.pi, 1.5 * np.pi, 2.5 * np.pi, np.nan, np.nan, np.nan], atol=1e-9)
    np.testing.assert_allclose(out["all"].y[:3, 1], [-1, 1, -1], atol=1e-9)
    np.testing.assert_allclose(
        jax.jit(jax.jacrev(lambda w: seen(w)["all"].t[:3]))(1.0), -np.array([0.5, 1.5, 2.5]) * np.pi, rtol=1e-8
    )


def test_events_backwards_in_time_and_after_a_jump():
    grow = lambda t, y, k: k * y
    level = jode.Event(lambda t, y, k: y - 0.5)
    hit = jode.solve(grow, 1.0, (0.0, -5.0), 0.7, solver=FINE, observe=level).observed
    np.testing.assert_allclose(hit.t, -np.log(2) / 0.7, atol=1e-10)

    def after(dose, when):
        decay = lambda t, y, k: -y
        sol = jode.solve(
            decay, 1.0, (0.0, 5.0), solver=FINE, observe=level, jumps=(when[None], lambda t, y, a, x: y + x, dose[None])
        )
        return sol.observed.t

    dose, when = jnp.float64(1.0), jnp.float64(0.2)
    exact = lambda dose, when: when + jnp.log(2 * (jnp.exp(-when) + dose))
    (found, slopes), (want, true) = (jax.jit(jax.value_and_grad(f, (0, 1)))(dose, when) for f in (after, exact))
    np.testing.assert_allclose(found, want, atol=1e-10)
    np.testing.assert_allclose(slopes, true, atol=1e-9)


def test_what_is_no_event():
    f = lambda t, y, a: jnp.ones(())
    at_start = jode.solve(f, 0.0, (0.0, 1.0), observe=jode.Event(lambda t, y, a: y))
    assert (int(at_start.observed.count), int(at_start.status)) == (0, 0)
    wrong_way = jode.solve(f, -0.5, (0.0, 1.0), observe=jode.Event(lambda t, y, a: y, direction=-1))
    assert int(wrong_way.observed.count) == 0


def test_the_first_of_two_events_ends_the_row_and_equal_ones_both_do():
    f = lambda t, y, a: jnp.ones(2)
    event = lambda level, i: jode.Event(lambda t, y, a: y[i] - level)
    both = jode.solve(f, jnp.zeros(2), (0.0, 4.0), solver=FINE, observe=[event(1.0, 0), event(1.0, 1), event(1.5, 0)])
    np.testing.assert_allclose([e.t for e in both.observed], [1.0, 1.0, np.nan], atol=1e-12)
    np.testing.assert_array_equal([e.count for e in both.observed], [1, 1, 0])
    np.testing.assert_allclose(both.reached, 1.0, atol=1e-12)


def test_a_time_at_which_g_only_touches_zero_has_no_gradient():
    f = lambda t, y, a: a
    cube = jode.Event(lambda t, y, a: (y - 1) ** 3)
    time = lambda a: jode.solve(f, 0.0, (0.0, 3.0), a, solver=jode.Fixed(jode.rk4, 7), observe=cube).observed.t
    found, slope = jax.jit(jax.value_and_grad(time))(1.0)
    np.testing.assert_allclose(found, 1.0, atol=1e-4)
    assert np.isnan(slope)


@pytest.mark.parametrize(
    "solver", [pytest.param(s, id=k, marks=[pytest.mark.sweep] if k == "dopri8" else []) for k, s in SOLVERS.items()]
)
def test_a_function_at_times_of_its_own(solver):
    A = jnp.array([[-0.3, 1.2], [-1.0, -0.1]])
    f = lambda t, y, k: k * (A @ y)
    y0 = jnp.array([1.0, 0.5])
    g = lambda t, y, k: {"energy": k * jnp.sum(y * y), "first": y[:1] * t}
    at = jnp.array([2.5, 0.0, 4.0, 0.7, -1.0, 4.5])

    def seen(k, y0, at, adjoint=jode.Backprop()):
        return jode.solve(f, y0, (0.0, 4.0), k, solver=solver, adjoint=adjoint, observe=jode.At(at, g)).observed

    def exact(k, y0, at):
        return jax.vmap(lambda t: g(t, jax.scipy.linalg.expm(k * t * A) @ y0, k))(at)

    total = lambda out: jnp.sum(out["energy"][:4] ** 2) + jnp.sum(out["first"][:4])
    slopes = lambda f, derivative=jax.grad: derivative(lambda *x: total(f(*x)), (0, 1, 2))

    @jax.jit
    def known(*x):
        return exact(*x), slopes(exact)(*x)

    out, (want, true) = seen(1.1, y0, at), known(1.1, y0, at)
    for name in out:
        np.testing.assert_allclose(out[name][:4], want[name][:4], rtol=0, atol=1e-8)
        assert np.isnan(out[name][4:]).all()
    found = [
        jax.jit(slopes(lambda *x, a=adjoint: seen(*x, a)))(1.1, y0, at)
        for adjoint in (jode.Backprop(), jode.Backprop(3), jode.MemoryFree())
    ]
    for got in found:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-7), got, true)
    forward = jax.jit(slopes(seen, jax.jacfwd))(1.1, y0, at)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), found[0], forward)
    both = jnp.array([0.9, 1.1]), np.stack([at[::-1], at])
    rows = jax.jit(jax.vmap(lambda k, at: seen(k, y0, at)["energy"]))(*both)
    np.testing.assert_allclose(rows[1][:4], out["energy"][:4], rtol=1e-11)


@pytest.mark.parametrize("solver", [FINE, jode.Fixed(jode.rk4, 40)], ids=["adaptive", "fixed"])
def test_what_is_seen_at_the_start_is_before_a_jump_there_and_so_are_its_derivatives(solver):
    """By At and by Dense; the derivative by time is along the slope before the jump."""

    def seen(y0, x, t):
        observe = [jode.At(t[None], lambda t, y, k: y**2), jode.Dense(200)]
        jumps = (jnp.zeros(1), lambda t, y, k, x: y + x, x[None])
        at, p = jode.solve(lambda t, y, k: -k * y, y0, (0.0, 1.0), 1.3, solver=solver, observe=observe, jumps=jumps).observed
        return jnp.stack([at[0], p(t) ** 2])

    x = (0.7, jnp.float64(1.0), jnp.float64(0.0))
    np.testing.assert_allclose(seen(*x), 0.49, rtol=1e-14)
    for derivative in (jax.jacrev, jax.jacfwd):
        for got, want in zip(derivative(seen, (0, 1, 2))(*x), (1.4, 0.0, -2 * 1.3 * 0.49), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-13)
    rows = jax.vmap(jax.grad(lambda y0: jnp.sum(seen(y0, *x[1:]))))(jnp.array([0.7, 0.1]))
    np.testing.assert_allclose(rows, [2.8, 0.4], rtol=1e-13)


def test_equal_steps_over_no_time_see_the_initial_state():
    end = lambda y0: (
        jode.solve(
            lambda t, y, k: -y,
            y0,
            (1.0, 1.0),
            solver=jode.Fixed(jode.rk4, 3),
            observe=[jode.At([1.0], lambda t, y, k: y), jode.Dense()],
        ).observed
    )
    value = lambda y0: jnp.stack([end(y0)[0][0], end(y0)[1](1.0)])
    np.testing.assert_array_equal(value(0.7), 0.7)
    np.testing.assert_array_equal(jax.jacrev(value)(0.7), 1.0)
    assert np.isnan(end(0.7)[1](jnp.array([0.9, 1.1]))).all()


def test_a_row_is_not_harmed_by_what_g_would_be_far_from_its_step():
    """One row has a time to look at early, the other late, where its first polynomial is far below zero or above one."""
    at = jnp.array([[0.02, 1.99], [1.98, 1.99]])
    g = lambda t, y, k: jnp.sqrt(y) + jnp.sqrt(1.01 - y)

    def total(k):
        run = lambda at, k: jode.solve(lambda t, y, k: -k * y, 1.0, (0.0, 2.0), k, solver=FINE, observe=jode.At(at, g)).observed
        return jnp.sum(jax.vmap(run)(at, k))

    k = jnp.array([1.0, 2.0])
    exact = lambda k: jnp.sum(g(0, jnp.exp(-k[:, None] * at), 0))
    np.testing.assert_allclose(jax.grad(total)(k), jax.grad(exact)(k), rtol=1e-7)


@pytest.mark.optimized
def test_ten_numbers_of_ten_thousand_take_a_tenth_of_the_memory_of_the_states():
    """At 401 times, with their gradient, and they are those of the states to rounding."""
    n, ts = 10_000, jnp.linspace(0.0, 1.0, 401)
    project = jnp.sin(jnp.arange(10.0 * n)).reshape(10, n) / n
    f = lambda t, y, k: -k * jnp.roll(y, 1) - y**3
    solver, adjoint = jode.Adaptive(jode.tsit5, 1e-6, 1e-6, max_steps=64), jode.Backprop(8)

    def of_states(y0, k):
        return jode.odeint(f, y0, ts, k, solver=solver, adjoint=adjoint) @ project.T

    def states(y0, k):
        return jode.odeint(f, y0, ts, k, solver=solver, adjoint=adjoint)

    def seen(y0, k):
        at = jode.At(ts, lambda t, y, k: project @ y)
        return jode.solve(f, y0, (0.0, 1.0), k, solver=solver, adjoint=adjoint, observe=at).observed

    def compiled(f):
        program = jax.jit(f).lower(*x).compile()
        memory = program.memory_analysis()
        return program(*x), memory.temp_size_in_bytes + memory.output_size_in_bytes

    x = (jnp.cos(jnp.arange(float(n))), jnp.float64(1.1))
    (ys, all_), (values, few) = compiled(states), compiled(seen)
    np.testing.assert_allclose(values, ys @ project.T, rtol=0, atol=1e-14)  # sums of 10,000 terms in another order
    assert 10 * few < all_
    square = lambda f: jax.grad(lambda *x: jnp.sum(f(*x) ** 2), (0, 1))
    (want, all_), (got, few) = compiled(square(of_states)), compiled(square(seen))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14), got, want)
    assert 10 * few < all_


def test_wrong_use_is_refused_in_words():
    f = lambda t, y, args: -y
    solve = lambda observe, **kw: jode.solve(f, 1.0, (0.0, 1.0), observe=observe, **kw)
    with pytest.raises(TypeError, match="g must be a function"):
        jode.Event(3.0)
    with pytest.raises(ValueError, match="direction must be"):
        jode.Event(f, direction=2)
    with pytest.raises(ValueError, match="most must be"):
        jode.Event(f, most=0)
    with pytest.raises(TypeError, match="one real number"):
        solve(jode.Event(lambda t, y, args: jnp.stack([y, y])))
    for none in ([], None):
        with pytest.raises(ValueError, match="at least one time"):
            solve(jode.At(none, f))
    with pytest.raises(TypeError, match="floating"):
        solve(jode.At([0.5], lambda t, y, args: y > 0))
    with pytest.raises(ValueError, match="Layers"):
        jode.solve(lambda t, y, w: -w * y, 1.0, (0.0, 1.0), jnp.ones(3), solver=jode.Layers(jode.euler), observe=jode.Event(f))
    with pytest.raises(TypeError, match="observe must be"):
        solve(f)
    with pytest.raises(ValueError, match="observers see steps"):
        solve(jode.Event(f), adjoint=jode.Backsolve())


def test_rows_that_end_in_one_chapter_of_a_grid_stay_there_when_it_is_found_again():
    """Rows end early and late, f is not finite soon after, and the grid is longer than what is recorded at once."""
    f = lambda t, y, k: k * jnp.sqrt(1 - y) * jnp.ones(())
    k = jnp.linspace(0.02, 1.5, 24)
    level = jode.Event(lambda t, y, k: y - 0.99)
    solver = jode.Adaptive(jode.bosh3, 1e-10, 1e-10, max_step=0.05)

    def solved(k):
        return jode.solve(f, 0.0, (0.0, 100.0), k, solver=solver, observe=level)

    sol = jax.vmap(solved)(k)
    assert int(sol.stats.steps.max()) > 600
    assert int(sol.stats.steps.min()) < 200
    exact = lambda k: 2 * (1 - 0.1) / k
    np.testing.assert_allclose(sol.observed.t, exact(k), rtol=1e-6)  # 500 steps of 1e-10, over a slope of 0.1
    total = lambda k: jnp.sum(jax.vmap(lambda k: solved(k).observed.t)(k))
    got, forward = jax.jit(jax.grad(total))(k), jax.jit(lambda k: jax.jvp(total, (k,), (k,))[1])(k)
    np.testing.assert_allclose(got, -exact(k) / k, rtol=1e-4)
    np.testing.assert_allclose(got @ k, forward, rtol=1e-10)


def test_events_of_many_rows_that_finish_in_groups():
    decay = lambda t, y, k: -k * y
    level = jode.Event(lambda t, y, k: y - 0.5)
    k = jnp.linspace(0.1, 4.0, 4200)
    solver = jode.Adaptive(jode.bosh3, 1e-8, 1e-8)
    hit = jax.vmap(lambda k: jode.solve(decay, 1.0, (0.0, 20.0), k, solver=solver, observe=level).observed.t)
    np.testing.assert_allclose(hit(k), np.log(2) / k, rtol=1e-5)


def test_what_lies_between_the_last_state_saved_and_a_failure_is_not_known():
    """y' = a y² blows up at 1: with steps known beforehand the states after ts[1] are lost, and so is what was seen of them."""
    solver, level = jode.Fixed(jode.rk4, 40), jode.Event(lambda t, y, a: y - 3, terminate=False, most=2)
    observe = {"steps": jode.Steps(), "cross": level, "at": jode.At([0.3, 0.8], lambda t, y, a: y)}

    f = lambda t, y, a: a * y**2

    def seen(y0, ts=(0.0, 0.5, 2.0)):
        return jode.solve(f, y0, ts, 1.0, solver=solver, observe=observe)

    sol = seen(1.0)
    assert sol.status == jode.Status.nonfinite_state
    out = sol.observed
    assert int(out["steps"].count) == 40
    assert int(out["cross"].count) == 0
    np.testing.assert_array_equal(np.isnan(out["at"]), [False, True])
    slope = jax.grad(lambda y0: seen(y0).observed["at"][1])(1.0)
    assert np.isnan(slope)
    np.testing.assert_allclose(jax.grad(lambda y0: seen(y0).observed["steps"].ys[39])(1.0), 4.0, rtol=1e-4)
    good = jax.vmap(lambda y0: seen(y0, (0.0, 0.4)).observed["cross"].count)(jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(good, [0, 1])


@pytest.mark.parametrize("solver", [FINE, jode.Fixed(jode.tsit5, 60)], ids=["adaptive", "fixed"])
def test_steps_and_polynomials_of_a_row_that_an_event_ended(solver):
    """The step that passed the event has no entry among the steps; cotangents of the others find theirs."""

    def seen(h, ts=(0.0, 3.0)):
        sol = jode.solve(fall, jnp.stack([h, 2.0]), ts, 9.81, solver=solver, observe=[GROUND, jode.Steps(), jode.Dense()])
        hit, steps, p = sol.observed
        ys = jnp.where(jnp.isnan(steps.ts)[:, None], 0.0, steps.ys)
        return jnp.sum(ys**2) + jnp.sum(p(jnp.array([0.1, 0.4])) ** 2), (hit, steps, p)

    (_, (hit, steps, p)), slope = jax.jit(jax.value_and_grad(seen, has_aux=True))(1.0)
    assert np.nanmax(steps.ts) <= hit.t
    assert np.isnan(jax.jit(lambda p, t: p(t))(p, hit.t + 0.01)).all()
    np.testing.assert_allclose(slope, jax.jit(jax.jacfwd(lambda h: seen(h)[0]))(1.0), rtol=1e-11)


# What lies inside of a step, at the start, at the end, and on a save time.

WIDE = {
    "tsit5": jode.Adaptive(),
    "dopri8": jode.Adaptive(jode.dopri8),
    "rodas5p": jode.Adaptive(jode.rodas5p),
    "one step": jode.Fixed(jode.rk4, 1),
}
WAYS = pytest.mark.parametrize("way", [1.0, -1.0], ids=["on", "back"])
IN_WIDE_STEPS = pytest.mark.parametrize("solver", WIDE.values(), ids=WIDE)


@pytest.mark.parametrize(
    ("solver", "way"),
    [
        pytest.param(s, way, id=f"{k}-{way:+g}", marks=[pytest.mark.sweep] if k in ("dopri8", "rodas5p") and way < 0 else [])
        for k, s in WIDE.items()
        for way in (1.0, -1.0)
    ],
)
def test_all_crossings_inside_of_one_step_are_found_in_order(solver, way):
    """Both zeros of a parabola, the three of a cubic, alone and as rows; each of a direction; and the first of them ends a row."""
    parabola = lambda t, roots: (t - roots[0]) * (t - roots[1])
    cubic = lambda t, roots: parabola(t, roots) * (t - roots[2])

    def found(p, roots, **kw):
        f, ts = lambda t, y, roots: jax.grad(p)(t, roots), way * jnp.array([-8.0, 5.0])
        event = jode.Event(lambda t, y, roots: y, **{"terminate": False, "most": 4, **kw})
        return jode.solve(f, p(ts[0], roots), ts, roots, solver=solver, observe=event).observed

    roots = way * np.sort(np.roots([1, 6, -4, -12]))  # in the order of the solve
    roots = jnp.asarray(roots)
    every = jax.jit(lambda r: found(cubic, r))(roots)
    assert every.count == 3
    np.testing.assert_allclose(every.t[:3], roots, rtol=1e-9)
    up = way > 0  # the first crossing of t³ is upwards, and that of -(-t)³ downwards
    for direction, want in ((1, roots[::2] if up else roots[1::2]), (-1, roots[1::2] if up else roots[::2])):
        some = found(cubic, roots, direction=direction)
        assert some.count == len(want)
        np.testing.assert_allclose(some.t[: len(want)], want, rtol=1e-9)
    first = found(cubic, roots, terminate=True, most=1)
    np.testing.assert_allclose(first.t, roots[0], rtol=1e-9)
    pairs = way * jnp.array([[-7.0, 4.5], [-6.9, -4.0], [1.0, 4.9], [-3.0, 3.0]])
    rows = jax.jit(jax.vmap(lambda r: found(parabola, r)))(pairs)
    np.testing.assert_array_equal(rows.count, 2)
    np.testing.assert_allclose(rows.t[:, :2], pairs, rtol=1e-9)


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        pytest.param(WIDE["tsit5"], jode.Backprop(), id="tsit5-stored"),
        pytest.param(WIDE["one step"], jode.MemoryFree(), id="one step-memory-free"),
        pytest.param(WIDE["tsit5"], jode.MemoryFree(), id="tsit5-memory-free", marks=pytest.mark.sweep),
        pytest.param(WIDE["one step"], jode.Backprop(), id="one step-stored", marks=pytest.mark.sweep),
    ],
)
def test_several_crossings_of_one_step_have_all_derivatives(solver, adjoint):
    """y = (t - b)² - a: the zeros are b ± √a."""

    def times(a, b):
        event = jode.Event(lambda t, y, b: y, terminate=False, most=3)
        f = lambda t, y, b: 2.0 * (t - b)
        hit = jode.solve(f, b * b - a, (0.0, 2.0), b, solver=solver, adjoint=adjoint, observe=event).observed
        return hit.t[:2] @ jnp.array([1.0, 3.0])

    exact = lambda a, b: (b - jnp.sqrt(a)) + 3 * (b + jnp.sqrt(a))
    x = (0.25, 1.0)
    of = lambda f: jax.jit(lambda *x: (f(*x), jax.grad(f, (0, 1))(*x), jax.jacfwd(f, (0, 1))(*x), jax.hessian(f, (0, 1))(*x)))(*x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), of(times), of(exact))
    rows, each = jnp.linspace(0.05, 0.8, 5), lambda f: lambda a, b: jnp.sum(jax.vmap(f, (0, None))(a, b))
    got, want = (jax.jit(jax.grad(each(f), (0, 1)))(rows, 1.0) for f in (times, exact))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("direction", [-1, 0])
def test_a_ball_bounces_as_long_as_one_likes_from_where_it_was_seen(dtype, direction):
    """Started again from the state and the time observed, for flights that all end within the first step."""
    ground, e, g = jode.Event(below, direction), 0.8, 9.81

    def bounce(carry, _):
        t, y = carry
        sol = jode.solve(fall, y, jnp.stack([t, t + 3]), jnp.asarray(g, dtype), observe=ground)
        hit = sol.observed
        return (hit.t, hit.y * jnp.array([1.0, -e], dtype)), (hit.t, hit.count)

    n = 30 if dtype == jnp.float64 else 20
    start = jnp.zeros((), dtype), jnp.array([0.0, 5.0], dtype)
    _, (times, counts) = jax.jit(lambda c: jax.lax.scan(bounce, c, None, length=n))(start)
    np.testing.assert_array_equal(counts, 1)
    # The interpolant's coefficients come to 389, and what a speed is off by goes on to 1 / (1 - e) = 5 later flights.
    np.testing.assert_allclose(times, np.cumsum(2 * 5.0 * e ** np.arange(n) / g), rtol=5 * 389 * jnp.finfo(dtype).eps)


@IN_WIDE_STEPS
def test_a_short_flight_is_seen_beside_a_component_that_is_large(solver):
    f = lambda t, y, g: jnp.stack([y[1], -g, 0 * y[2]])
    v = jnp.array([0.01, 0.3, 2.0])
    hit = jax.vmap(
        lambda v: jode.solve(f, jnp.stack([0 * v, v, 1e4 + 0 * v]), (0.0, 10.0), 9.81, solver=solver, observe=GROUND).observed
    )
    np.testing.assert_allclose(jax.jit(hit)(v).t, 2 * v / 9.81, rtol=1e-9)


ON_TIMES = {
    **WIDE,
    "steps to save times": jode.Adaptive(first_step=0.1, max_step=0.1),
    "fixed": jode.Fixed(jode.rk4, 3),
    "euler": jode.Fixed(jode.euler, 1),
    "width": jode.Fixed(jode.rk4, width=0.03),
}


@WAYS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("solver", ON_TIMES.values(), ids=ON_TIMES)
def test_a_save_time_at_an_event_is_before_it_and_one_at_the_end_is_found(solver, dtype, way):
    """y' = r: g is zero at one of the save times, the last one among them, or at the start, where it is no event."""
    ts = way * jnp.linspace(0, 1, 11, dtype=dtype)
    rng = np.random.default_rng(0)
    at = jnp.arange(33) % 11
    r = jnp.asarray(rng.choice([-1, 1], 33) * np.where(at % 2 == 0, 1.0, rng.uniform(0.3, 3, 33)), dtype)
    c = jnp.asarray(np.where(at % 3 == 0, 0.0, rng.uniform(-1, 1, 33)), dtype)

    def one(r, c, T):
        observe = {
            "hit": jode.Event(lambda t, y, args: y - (c + r * T)),
            "at": jode.At(ts, lambda t, y, r: y),
            "p": jode.Dense(400),
            "steps": jode.Steps(400),
        }
        sol = jode.solve(lambda t, y, r: r, c, ts, r, solver=solver, observe=observe)
        return sol, sol.observed["p"](T)

    sol, y = jax.jit(jax.vmap(one))(r, c, ts[at])
    moved, seen = at > 0, sol.observed
    np.testing.assert_array_equal(seen["hit"].count, moved)
    np.testing.assert_array_equal(sol.status, np.where(moved, jode.Status.event, jode.Status.success))
    known = np.arange(11) <= np.where(moved, at, 10)[:, None]
    np.testing.assert_array_equal(np.isfinite(sol.ys), known)
    np.testing.assert_array_equal(np.isfinite(seen["at"]), known)
    tol = 1000 * jnp.finfo(dtype).eps
    np.testing.assert_allclose(seen["hit"].t[moved], ts[at][moved], rtol=0, atol=tol)
    saved = np.take_along_axis(np.asarray(sol.ys), np.asarray(at)[:, None], 1)[:, 0]
    np.testing.assert_allclose(saved[moved], seen["hit"].y[moved], rtol=0, atol=4 * tol)
    np.testing.assert_allclose(y, saved, rtol=0, atol=4 * tol)
    assert (way * (sol.reached - ts[at])[moved] >= 0).all() or np.abs(sol.reached - ts[at])[moved].max() <= tol


@pytest.mark.parametrize("solver", [WIDE["tsit5"], jode.Fixed(jode.rk4, 3), jode.Adaptive(first_step=0.1, max_step=0.1)], ids=repr)
def test_derivatives_of_what_is_seen_on_the_time_of_an_event(solver):
    """States saved, and seen, at the time of an event move as others do: y' = r."""
    ts = jnp.linspace(0.0, 1.0, 11)

    def seen(r, c):
        observe = jode.Event(lambda t, y, r: y - 0.8), jode.At(ts, lambda t, y, r: y * y)
        sol = jode.solve(lambda t, y, r: r, c, ts, r, solver=solver, observe=observe)
        hit, at = sol.observed
        return jnp.stack([hit.t, hit.y, sol.ys[8], at[8], sol.ys[7]])

    exact = lambda r, c: jnp.stack([(0.8 - c) / r, jnp.asarray(0.8), 0.8 * r + c, (0.8 * r + c) ** 2, 0.7 * r + c])
    for derivative in (jax.jacrev, jax.jacfwd):
        got, want = (jax.jit(derivative(f, (0, 1)))(1.0, 0.0) for f in (seen, exact))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), got, want)


@pytest.mark.parametrize("solver", [FINE, jode.Fixed(jode.dopri8, 40)], ids=["adaptive", "fixed"])
def test_a_start_from_where_a_crossing_was_seen_does_not_see_it_again(solver):
    oscillator = lambda t, y, w: jnp.stack([y[1], -w * y[0]])
    event = jode.Event(lambda t, y, w: y[0] - 0.3)

    def on(carry, _):
        t, y = carry
        hit = jode.solve(oscillator, y, jnp.stack([t, t + 6]), 1.0, solver=solver, observe=event).observed
        return (hit.t, hit.y), hit.t

    _, times = jax.jit(lambda: jax.lax.scan(on, (jnp.zeros(()), jnp.array([1.0, 0.0])), None, length=7))()
    a = np.arccos(0.3)
    exact = np.sort(np.concatenate([2 * np.pi * np.arange(4) + a, 2 * np.pi * np.arange(1, 5) - a]))[:7]
    np.testing.assert_allclose(times, exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("solver", [FINE, jode.Fixed(jode.dopri8, 40)], ids=["adaptive", "fixed"])
def test_a_crossing_at_a_stop_or_a_jump_is_found_once(solver):
    """g is zero where the state is kicked: before it, and after it too."""
    event = jode.Event(lambda t, y, a: t - 0.7, terminate=False, most=4)
    f = lambda t, y, a: -y
    for given in ({"stops": [0.7]}, {"jumps": ([0.7], lambda t, y, a: y + 1)}):
        hit = jode.solve(f, 1.0, (0.0, 2.0), solver=solver, observe=event, **given).observed
        assert hit.count == 1
        np.testing.assert_allclose(hit.t[0], 0.7, rtol=1e-13)
        np.testing.assert_allclose(hit.y[0], np.exp(-0.7), rtol=1e-8)
    level = jode.Event(lambda t, y, a: y - 0.5, terminate=False, most=4)
    dose = ([np.log(2.0)], lambda t, y, a: y + 1)
    hit = jode.solve(f, 1.0, (0.0, 3.0), solver=solver, observe=level, jumps=dose).observed
    np.testing.assert_allclose(hit.t[-2:], np.nan)
    assert hit.t[1] > 1.0 or hit.count == 1


@pytest.mark.parametrize("wrong", ["pair", "vector", "int", "nothing", "complex", "dict"])
def test_g_of_an_event_is_one_real_number(wrong):
    g = {
        "pair": lambda t, y, a: (y,),
        "vector": lambda t, y, a: y[None],
        "int": lambda t, y, a: 1,
        "nothing": lambda t, y, a: None,
        "complex": lambda t, y, a: jax.lax.complex(y, y),
        "dict": lambda t, y, a: {"a": y},
    }[wrong]
    with pytest.raises(TypeError, match=r"Event: g\(t, y, args\) must return one real number.*; got"):
        jode.solve(lambda t, y, a: -y, 1.0, (0.0, 1.0), observe=jode.Event(g))
    with pytest.raises(ValueError, match="looks must be"):
        jode.Event(below, looks=0)


NO_TIME = {
    "tsit5": (jode.Adaptive(), {}),
    "rodas5p": (jode.Adaptive(jode.rodas5p), {}),
    "fixed": (jode.Fixed(jode.rk4, 3), {}),
    "stops": (jode.Adaptive(), {"stops": [1.5, 1.7]}),
}


@pytest.mark.parametrize(
    ("case", "t1"),
    [
        pytest.param(case, t1, marks=[pytest.mark.sweep] if (case, t1) in (("rodas5p", 1.0), ("stops", 1.0)) or t1 < 1 else [])
        for case in NO_TIME
        for t1 in (1.0, 2.0, 0.5)  # alone, and beside a row that goes on, or back
    ],
)
def test_over_no_time_observers_know_the_initial_state(case, t1):
    """And its derivatives by y0, the initial time, args and the time looked at: y' = -k y t, g = k y² + t."""
    solver, given = NO_TIME[case]

    def seen(y0, t0, k, t, t1):
        f, g = (lambda t, y, k: -k * y * t), (lambda t, y, k: k * y * y + t)
        observe = jode.Dense(64), jode.At(t[None], g), jode.Steps(64), jode.Event(lambda t, y, k: y - 0.7)
        sol = jode.solve(f, y0, jnp.stack([t0, t1]), k, solver=solver, observe=observe, **given)
        p, at, steps, hit = sol.observed
        return jnp.stack([p(t), at[0]]), (p.until, steps.count, hit.count, sol.status)

    def known(y0, t0, k, t):
        y = y0 * jnp.exp(-k * (t * t - t0 * t0) / 2)
        return jnp.stack([y, k * y * y + t])

    x = (jnp.float64(0.7), jnp.float64(1.0), jnp.float64(1.3), jnp.float64(1.0))
    if t1 == 1.0:
        value, (until, steps, hits, status) = seen(*x, x[1])
        np.testing.assert_array_equal(value, known(*x))
        assert (until, steps, hits, status) == (1.0, 0, 0, jode.Status.success)
        for derivative in (jax.jacrev, jax.jacfwd):
            got = jax.jit(derivative(lambda *x: seen(*x)[0], (0, 1, 2, 3)))(*x, x[1])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), got, jax.jacfwd(known, (0, 1, 2, 3))(*x))
    rows = [jnp.stack([z, z]) for z in x]
    total = lambda f: lambda *x: jnp.sum(f(*x) @ jnp.array([1.0, 10.0]))
    many = jax.vmap(lambda *x: seen(*x)[0])
    ends = jnp.array([1.0, t1])
    np.testing.assert_allclose(many(*rows, ends), jax.vmap(known)(*rows), rtol=1e-15)
    got = jax.jit(jax.grad(total(many), (0, 1, 2, 3)))(*rows, ends)
    want = jax.grad(total(jax.vmap(known)), (0, 1, 2, 3))(*rows)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-13)
        np.testing.assert_allclose(a[1], b[1], rtol=1e-6)  # of a polynomial's slope, where the row moves


BESIDE = {
    "nothing": lambda t1: {},
    "a save time again": lambda t1: {"ts": t1},
    "padding": lambda t1: {"ts": jnp.inf},
    "a stop that never comes": lambda t1: {"stops": jnp.array([jnp.inf])},
    "a stop before the start": lambda t1: {"stops": jnp.array([-1.0])},
    "a stop at the end": lambda t1: {"stops": t1[None]},
    "a jump that never comes": lambda t1: {"jumps": (jnp.array([jnp.inf]), lambda t, y, a: y + 1)},
}


@pytest.mark.parametrize("solver", [jode.Fixed(jode.rk4, 3), jode.Adaptive()], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("name", BESIDE)
def test_an_event_at_the_end_is_found_beside_times_that_say_nothing(name, solver):
    """y' = -k from k T: zero at T to rounding, whichever side of it."""

    def run(k, t1):
        given = BESIDE[name](t1)
        ts = [0 * t1, t1 / 3, t1] + ([given.pop("ts") * jnp.ones_like(t1)] if "ts" in given else [])
        sol = jode.solve(
            lambda t, y, a: -k + 0 * y, k * t1, jnp.stack(ts), solver=solver, observe=jode.Event(lambda t, y, a: y), **given
        )
        return sol.observed.count, sol.status

    counts, status = jax.vmap(run)(*np.random.default_rng(0).uniform(0.5, 2.0, (2, 100)))
    assert (counts == 1).all()
    assert (status == jode.Status.event).all()


@pytest.mark.parametrize("solver", [jode.Fixed(jode.rk4, 3), jode.Adaptive()], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("ts", [(0.0, 1.0), (0.0, 0.7, 1.0), (0.0, 0.7, 0.7, 1.0)])
def test_a_jump_over_zero_is_no_crossing_wherever_save_times_are(ts, solver):
    jumps = (jnp.array([0.7]), lambda t, y, a: y + 1)
    sol = jode.solve(lambda t, y, a: -0.1 + 0 * y, -0.5, ts, solver=solver, jumps=jumps, observe=jode.Event(lambda t, y, a: y))
    assert sol.observed.count == 0
    assert sol.status == jode.Status.success


@pytest.mark.parametrize("solver", [jode.Adaptive(jode.tsit5, 1e-10, 1e-10), jode.Fixed(jode.rk4, 200)], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_nth_crossing_may_end_a_trajectory(solver, n):
    """cos and sin of time cross zero every half turn."""
    f = lambda t, y, a: jnp.stack([y[1], -y[0]])
    start = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    run = lambda y: jode.solve(f, y, (0.0, 2.0, 20.0), solver=solver, observe=jode.Event(lambda t, y, a: y[0], terminate=n))
    sol = jax.vmap(run)(start)
    ends = np.pi * np.array([n, n - 0.5])
    assert (sol.status == jode.Status.event).all()
    np.testing.assert_array_equal(sol.observed.count, [n, n])
    np.testing.assert_allclose(sol.reached, ends, rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(sol.ys[:, 1, 0]), ends < 2)
    slope = jax.grad(lambda y: jnp.ravel(run(y).observed.t)[n - 1])(start[0])
    np.testing.assert_allclose(slope, [-1.0, 0.0], atol=1e-6)


def test_a_condition_may_be_a_boolean():
    f = lambda t, y, a: jnp.stack([y[1], -y[0]])
    run = lambda g: jode.solve(f, jnp.array([0.5, 1.0]), (0.0, 20.0), observe=jode.Event(g))
    number, boolean = run(lambda t, y, a: y[0]), run(lambda t, y, a: y[0] > 0)
    np.testing.assert_allclose(boolean.observed.t, number.observed.t, rtol=1e-12)
    assert boolean.status == jode.Status.event
    for terminate in (-1, 1.5, None):
        with pytest.raises(ValueError, match="terminate"):
            jode.Event(lambda t, y, a: y[0], terminate=terminate)
    with pytest.raises(TypeError, match="one real number"):
        jode.solve(f, jnp.ones(2), (0.0, 1.0), observe=jode.Event(lambda t, y, a: y[0] > 0, reset=lambda t, y, a: y))
