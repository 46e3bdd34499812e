"""Events that reset the state and let the row go on, against closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode

close = np.testing.assert_allclose
TIGHT = jode.Adaptive(jode.tsit5, 1e-12, 1e-12)


# --- a ball that bounces: times, speeds and heights are known


def falling(t, y, args):
    return jnp.stack([y[1], -args[0]])


def floor(most=20, **options):
    return jode.Event(lambda t, y, a: y[0], -1, most=most, reset=lambda t, y, a: jnp.stack([0 * y[0], -a[1] * y[1]]), **options)


def bounces(p, n, xp=jnp):
    """Times of the first n bounces from height h, with gravity g and restitution e."""
    h, g, e = p
    return xp.sqrt(2 * h / g) * (1 + 2 * xp.cumsum(xp.concatenate([xp.zeros(1), e ** xp.arange(1.0, n)])))


def height(p, t, n):
    """Height and speed at t after n bounces."""
    h, g, e = p
    s, v = t - (bounces(p, n)[-1] if n else 0), jnp.sqrt(2 * g * h) * e**n if n else 0.0
    return jnp.stack([(0 if n else h) + v * s - g * s * s / 2, v - g * s])


def ball(p, ts, most=20, solver=TIGHT, **options):
    h, g, e = p
    return jode.solve(falling, jnp.stack([h, 0 * h]), ts, jnp.stack([g, e]), solver=solver, **{"observe": floor(most), **options})


BALL = jnp.array([1.0, 9.81, 0.9])


def test_twenty_bounces_are_at_their_times():
    sol = ball(BALL, (0.0, 7.5))
    assert sol.status == jode.Status.success
    assert sol.observed.count == 20
    close(sol.observed.t, bounces(BALL, 20), rtol=1e-10)
    close(sol.observed.y[:, 1], -jnp.sqrt(2 * 9.81) * 0.9 ** jnp.arange(20.0), rtol=1e-10)
    close(sol.ys[-1], height(BALL, 7.5, 20), rtol=1e-10)


@pytest.mark.parametrize("nest", [jax.jacfwd, jax.jacrev], ids=["jvp", "grad"])
def test_the_saltation_is_exact(nest):
    """Of the landing times and of where the ball is after twenty bounces, by height, gravity and restitution."""
    of = lambda p: (lambda s: (s.observed.t, s.ys[-1]))(ball(p, (0.0, 7.5)))
    times, end = nest(of)(BALL)
    close(times, jax.jacfwd(partial(bounces, n=20))(BALL), atol=1e-8)
    close(end, jax.jacfwd(lambda p: height(p, 7.5, 20))(BALL), atol=1e-8)


NESTS = {"fwd rev": (jax.jacfwd, jax.jacrev), "rev rev": (jax.jacrev, jax.jacrev), "fwd fwd": (jax.jacfwd, jax.jacfwd)}


@pytest.mark.parametrize("nest", [n if n == "fwd rev" else pytest.param(n, marks=pytest.mark.sweep) for n in NESTS])
def test_second_derivatives_too(nest):
    outer, inner = NESTS[nest]
    got = outer(inner(lambda p: ball(p, (0.0, 3.0), 5).ys[-1, 0]))(BALL)
    close(got, jax.hessian(lambda p: height(p, 3.0, 4)[0])(BALL), rtol=1e-8)


def test_a_thousand_balls_bounce_on_their_own():
    rng = np.random.default_rng(0)
    p = jnp.stack([jnp.asarray(rng.uniform(*x, 1000)) for x in ((1.0, 2.0), (5.0, 10.0), (0.75, 0.9))], 1)
    run = lambda p: ball(p, (0.0, 2.0), 12, jode.Adaptive(rtol=1e-9, atol=1e-9))
    sol = jax.jit(jax.vmap(run))(p)
    slopes = jax.jit(jax.vmap(jax.grad(lambda p: run(p).ys[-1, 0])))(p)
    ts = np.array(jax.vmap(partial(bounces, n=40))(p))
    count = (ts < 2).sum(1)
    assert (sol.status == jode.Status.success).all()
    np.testing.assert_array_equal(sol.observed.count, count)
    for n in range(1, int(count.max()) + 1):
        some = count == n
        if some.any():
            close(sol.ys[some, -1], jax.vmap(lambda p, n=n: height(p, 2.0, n))(p[some]), atol=1e-9)
            close(slopes[some], jax.vmap(jax.grad(lambda p, n=n: height(p, 2.0, n)[0]))(p[some]), rtol=1e-6, atol=1e-6)
    k = min(12, int(count.min()))
    close(sol.observed.t[:, :k], ts[:, :k], atol=1e-9)


def test_every_observer_sees_both_sides_of_a_bounce():
    ts, at = jnp.linspace(0.0, 3.0, 13), jnp.array([0.3, 1.1, 2.9])
    observe = {"floor": floor(5), "dense": jode.Dense(100), "steps": jode.Steps(100), "at": jode.At(at, lambda t, y, a: y)}
    exact = lambda p, t: height(p, t, int((np.asarray(bounces(p, 6)) < t).sum()))
    sol = ball(BALL, ts, observe=observe)
    close(sol.ys, jnp.stack([exact(BALL, t) for t in ts]), atol=1e-11)
    close(sol.observed["at"], jnp.stack([exact(BALL, t) for t in at]), atol=1e-11)
    inside = jnp.linspace(0.05, 2.95, 30)
    close(sol.observed["dense"](inside), jnp.stack([exact(BALL, t) for t in inside]), atol=1e-11)
    assert np.isin(np.asarray(sol.observed["floor"].t[:4]), np.asarray(sol.observed["steps"].ts)).all()  # bounces end steps

    def loss(p, adjoint=jode.Backprop()):
        s = ball(p, ts, observe=observe, adjoint=adjoint)
        return (
            jnp.sum(s.ys[:, 0] ** 2)
            + jnp.sum(s.observed["dense"](inside))
            + jnp.sum(s.observed["at"])
            + jnp.nansum(s.observed["floor"].y)
        )

    slope = jax.jacfwd(loss)(BALL)
    for checkpoints in (None, 3):
        close(jax.grad(loss)(BALL, jode.Backprop(checkpoints=checkpoints)), slope, rtol=1e-10)
    rows = BALL[None] * (1 + jnp.array([[0.0], [0.05], [-0.04]]))
    close(jax.vmap(jax.grad(loss))(rows), jnp.stack([jax.grad(loss)(p) for p in rows]), rtol=1e-9)


def test_what_is_saved_at_a_bounce_is_before_it():
    """Also at the end, where it counts and does not reset."""
    down = lambda p, n: jnp.array([0.0, -1.0]) * jnp.sqrt(2 * p[0] * p[1]) * p[2] ** (n - 1)
    for e in (0.9, 0.8, 0.85):
        p = BALL.at[2].set(e)
        ts = jnp.concatenate([jnp.zeros(1), bounces(p, 3)])
        sol = ball(p, ts, solver=jode.Adaptive(jode.dopri8, 1e-12, 1e-12))
        assert sol.status == jode.Status.success
        assert sol.observed.count == 3
        close(sol.ys[1:], jnp.stack([down(p, n) for n in (1, 2, 3)]), atol=1e-10)


def test_backwards_in_time_a_ball_gains_speed():
    """From its state after three bounces back to the start, with the inverse reset."""
    e = BALL[2]
    end = height(BALL, 2.2, 3)
    event = jode.Event(lambda t, y, a: y[0], -1, most=5, reset=lambda t, y, a: jnp.stack([0 * y[0], -y[1] / a[1]]))
    sol = jode.solve(falling, end, (2.2, 0.0), BALL[1:], solver=TIGHT, observe=event)
    close(sol.ys[-1], [1.0, 0.0], atol=1e-9)
    close(sol.observed.t[:3], bounces(BALL, 3)[::-1], rtol=1e-10)
    assert sol.observed.count == 3
    assert e < 1


# --- a leaky integrate-and-fire neuron


def spikes(p, n):
    """τ v' = I - v from 0, reset to r at the threshold: times of the first n spikes."""
    tau, drive, threshold, r = p
    first, between = (tau * jnp.log((drive - v) / (drive - threshold)) for v in (0.0, r))
    return first + between * jnp.arange(1.0 * n)


def test_two_hundred_spikes():
    p = jnp.array([1.0, 1.5, 1.0, 0.2])
    event = jode.Event(lambda t, v, a: v - a[2], 1, most=200, reset=lambda t, v, a: a[3] + 0 * v)
    solver = jode.Adaptive(jode.dopri8, 1e-12, 1e-12, max_steps=10_000)
    n = 200
    end = float(spikes(p, n)[-1]) + 0.1
    run = lambda p: jode.solve(lambda t, v, a: (a[1] - v) / a[0], 0.0, (0.0, end), p, solver=solver, observe=event)
    sol = run(p)
    assert sol.status == jode.Status.success
    assert sol.observed.count == n
    close(sol.observed.t, spikes(p, n), rtol=1e-10)
    slope = jax.jit(jax.grad(lambda p: run(p).observed.t[-1]))(p)
    close(slope, jax.grad(lambda p: spikes(p, n)[-1])(p), rtol=1e-8)


def test_count_counts_all_and_most_keeps_some():
    sol = ball(BALL, (0.0, 3.0), most=2)
    assert sol.observed.count == 4
    close(sol.observed.t, bounces(BALL, 2), rtol=1e-9)
    of = lambda p: jnp.sum(ball(p, (0.0, 3.0), most=2).observed.t)
    close(jax.grad(of)(BALL), jax.grad(lambda p: jnp.sum(bounces(p, 2)))(BALL), rtol=1e-8)


# --- several events, known times, and both


def test_a_thermostat_switches_between_two_modes():
    """T' = mode · power - T, off above `high`, on below `low`: a period of log(high/low) + log((P - low) / (P - high))."""
    low, high, power = 0.4, 0.8, 2.0
    switch = lambda to: lambda t, y, a: jnp.stack([y[0], to + 0 * y[1]])
    events = [
        jode.Event(lambda t, y, a: y[0] - a[1], 1, most=4, reset=switch(0.0)),
        jode.Event(lambda t, y, a: y[0] - a[0], -1, most=4, reset=switch(1.0)),
    ]
    f = lambda t, y, a: jnp.stack([y[1] * a[2] - y[0], 0 * y[1]])
    run = lambda a: jode.solve(f, jnp.array([0.5, 1.0]), (0.0, 4.0), a, solver=TIGHT, observe=events)

    def times(a):
        low, high, power = a
        first = jnp.log((power - 0.5) / (power - high))
        cool, heat = jnp.log(high / low), jnp.log((power - low) / (power - high))
        return first + (cool + heat) * jnp.arange(3.0), first + cool + (cool + heat) * jnp.arange(3.0)

    a = jnp.array([low, high, power])
    sol = run(a)
    for got, want in zip(sol.observed, times(a), strict=True):
        close(got.t[:3], want, rtol=1e-10)
    slopes = jax.jacrev(lambda a: [x.t[:3] for x in run(a).observed])(a)
    for got, want in zip(slopes, jax.jacfwd(times)(a), strict=True):
        close(got, want, rtol=1e-8, atol=1e-8)


def test_events_that_coincide_all_happen():
    """Two balls in one state, from the same height, and a third from another."""
    f = lambda t, y, a: jnp.concatenate([y[3:], jnp.full(3, -9.81)])
    e = jnp.array([0.9, 0.7, 0.8])

    def event(k):
        return jode.Event(lambda t, y, a: y[k], -1, most=6, reset=lambda t, y, a: y.at[k].set(0).at[3 + k].multiply(-a[k]))

    run = lambda h, e: jode.solve(
        f, jnp.concatenate([h, jnp.zeros(3)]), (0.0, 2.0), e, solver=TIGHT, observe=[event(k) for k in range(3)]
    )
    h = jnp.array([1.0, 1.0, 0.7])
    sol = run(h, e)
    for k in range(3):
        p = jnp.array([h[k], 9.81, e[k]])
        n = int((np.asarray(bounces(p, 20)) < 2).sum())
        assert sol.observed[k].count == n
        close(sol.observed[k].t[: min(n, 6)], bounces(p, min(n, 6)), rtol=1e-9)
        close(sol.ys[-1, [k, 3 + k]], height(p, 2.0, n), atol=1e-9)


def test_between_jumps_stops_and_an_event_that_ends():
    """A ball that is kicked upwards at given times bounces in between; an event ends it."""
    kicks = (jnp.array([0.2, 1.0]), lambda t, y, a, x: y.at[1].add(x), jnp.array([1.0, 2.0]))
    over = jode.Event(lambda t, y, a: t - 1.9 + 0 * y[0], 1)

    def by_hand(p):
        h, g, e = p
        y, t, out = jnp.stack([h, 0 * h]), 0.0, []
        for kind, until in (("kick", 0.2), ("floor", None), ("kick", 1.0), ("floor", None), ("floor", None)):
            s = until - t if kind == "kick" else (y[1] + jnp.sqrt(y[1] ** 2 + 2 * g * y[0])) / g
            y, t = jnp.stack([y[0] + y[1] * s - g * s * s / 2, y[1] - g * s]), t + s
            y = y.at[1].add(1.0 if until == 0.2 else 2.0) if kind == "kick" else jnp.stack([0 * y[0], -e * y[1]])
            out.append(t)
        return out, y

    p = jnp.array([1.0, 9.81, 0.8])
    run = lambda p: ball(p, (0.0, 3.0), observe=(floor(6), over), jumps=kicks, stops=jnp.array([0.5]))
    sol, (ts, _) = run(p), by_hand(p)
    close(sol.observed[0].t[:3], jnp.stack([ts[1], ts[3], ts[4]]), rtol=1e-9)
    got = jax.jacrev(lambda p: run(p).observed[0].t[:3])(p)
    close(got, jax.jacfwd(lambda p: jnp.stack([by_hand(p)[0][i] for i in (1, 3, 4)]))(p), rtol=1e-8, atol=1e-8)
    assert sol.status == jode.Status.event
    close(sol.reached, 1.9, rtol=1e-12)


def test_a_flight_within_one_step_is_found():
    """The ball leaves the floor and lands again long before the end of the first step, whose width another component suggests."""
    f = lambda t, y, a: jnp.stack([y[1], -9.81, 1e-3])
    reset = lambda t, y, a: jnp.stack([0.0, -0.5 * y[1], y[2]])
    event = jode.Event(lambda t, y, a: y[0], -1, most=8, reset=reset)
    sol = jode.solve(f, jnp.array([0.0, 1.0, 100.0]), (0.0, 0.39), solver=jode.Adaptive(first_step=0.3), observe=event)
    flight = 2 / 9.81
    close(sol.observed.t[:4], flight * np.cumsum(0.5 ** np.arange(4)), rtol=1e-9)


def test_crossings_that_pile_up_end_as_max_steps():
    sol = ball(jnp.array([1.0, 9.81, 0.5]), (0.0, 5.0), most=4, solver=jode.Adaptive(max_steps=300))
    assert sol.status == jode.Status.max_steps
    assert np.isnan(sol.ys[-1]).all()
    close(sol.reached, np.sqrt(2 / 9.81) * 3, rtol=1e-6)
    with pytest.raises(jode.SolveError, match="pile up"):
        jode.check(sol)


def test_a_grazing_crossing_has_no_derivative():
    """y = (t - 1)² - c touches zero for c = 0."""
    event = jode.Event(lambda t, y, a: y, -1, reset=lambda t, y, a: y + 1.0)
    run = lambda c: jode.solve(lambda t, y, a: 2 * (t - 1), 1 - c, (0.0, 2.0), solver=TIGHT, observe=event)
    assert abs(jax.grad(lambda c: run(c).observed.t)(jnp.asarray(0.01)) + 1 / (2 * 0.1)) < 1e-8
    slope = jax.grad(lambda c: run(c).observed.t)(jnp.asarray(0.0))
    assert np.isnan(slope) or run(jnp.asarray(0.0)).observed.count == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"solver": jode.Fixed(jode.rk4, 10)}, "Adaptive"),
        ({"adjoint": jode.MemoryFree()}, "Backprop"),
        ({"observe": jode.Event(lambda t, y, a: y[0], reset=lambda t, y, a: y[0])}, "reset"),
        ({"observe": jode.Event(lambda t, y, a: y[0], reset=lambda t, y, a: (y, y))}, "reset"),
    ],
)
def test_what_cannot_be_is_said(options, word):
    with pytest.raises((TypeError, ValueError), match=word):
        ball(BALL, (0.0, 1.0), **options)


@pytest.mark.parametrize(
    "solver",
    [jode.Adaptive(jode.dopri8, 1e-10, 1e-10), jode.Adaptive(jode.rodas5p, 1e-10, 1e-10), jode.Adaptive(jode.bosh3, 1e-9, 1e-9)],
    ids=["dopri8", "rodas5p", "bosh3"],
)
def test_with_other_methods(solver):
    run = lambda p: ball(p, (0.0, 2.0), solver=solver)
    close(run(BALL).ys[-1], height(BALL, 2.0, 3), atol=1e-7)
    close(jax.grad(lambda p: run(p).ys[-1, 0])(BALL), jax.grad(lambda p: height(p, 2.0, 3)[0])(BALL), rtol=1e-6)


def test_single_precision():
    p = BALL.astype(jnp.float32)
    sol = ball(p, jnp.array([0.0, 3.0], jnp.float32), solver=jode.Adaptive(rtol=1e-6, atol=1e-6))
    assert sol.observed.count == 4
    assert sol.ys.dtype == jnp.float32
    close(sol.observed.t[:4], bounces(BALL, 4), rtol=3e-6)
