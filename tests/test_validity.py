"""Is it an ODE? Verdicts on models of which the answer is known, and the adaptation's decisions, one by one."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import jode
from jode import data, train
from jode.models.planar import Planar
from jode.validity import (
    StepAdaptation,
    StepState,
    ToleranceAdaptation,
    agreement,
    convergence,
    critical_steps,
    crossings,
    first_step,
    local_errors,
    measured_errors,
    paired,
    swap,
)


def decay(solver):
    """The 'accuracy' of a model that is what one Euler step makes of dx/dt = -x: any other step count changes it."""
    return jode.odeint(lambda t, y, a: -y, jnp.ones(()), (0.0, 1.0), solver=solver)[-1]


SOLVERS = [
    jode.Fixed(jode.euler, 1),
    jode.Fixed(jode.euler, 2),
    jode.Fixed(jode.midpoint, 4),
    jode.Adaptive(jode.dopri5, 1e-6, 1e-6),
]


def test_a_model_of_one_coarse_step_is_not_an_ode_and_one_of_many_is():
    coarse = swap(jax.jit(decay), SOLVERS)
    assert not coarse.valid
    np.testing.assert_allclose(coarse.table[0], [0, 0.25, decay(SOLVERS[2]), np.exp(-1)], atol=1e-6)
    fine = swap(jax.jit(decay), [jode.Fixed(jode.euler, 100), *SOLVERS])  # 0.366 for 0.368
    assert fine.valid
    assert fine.counts[0].tolist() == [
        False,
        False,
        False,
        False,
        True,
    ]  # its own is no test; h^2 of 4 midpoint steps is coarser than h of 100
    assert "Verdict: an ODE (one number, so no interval" in str(fine)
    assert str(fine).count("coarser, not counted") == 3


# The verdict: paired, with its uncertainty, free of scale, free of a metric.

TWO = [jode.Fixed(jode.euler, 8), jode.Fixed(jode.rk4, 8)]


def answers(own, test):
    """A metric that is `own` under the training solver and `test` under the other."""
    return lambda solver: own if solver.method is jode.euler else test


def test_a_change_is_judged_against_what_the_metric_can_be():
    assert swap(answers(0.083, 0.0), TWO).verdicts == ["not an ODE"]
    assert swap(answers(982.6, 979.6), TWO).verdicts == ["an ODE"]
    assert swap(answers(0.99, 0.91), TWO, spread=1.0).verdicts == ["not an ODE"]
    assert swap(answers(0.99, 0.91), TWO, spread=1.0, tolerance=0.1).verdicts == ["an ODE"]


METRICS = {
    "right or wrong": lambda rng, n: ((a := rng.random(n) < 0.9), a ^ (rng.random(n) < 0.03)),
    "a loss": lambda rng, n: ((a := rng.gamma(0.5, size=n)), a * (1 + 0.1 * rng.normal(size=n))),
    "a likelihood": lambda rng, n: ((a := rng.normal(3, 2, n)), a + 0.2 * rng.normal(size=n)),
    "one number": lambda rng, n: (np.float64(a := rng.random()), a * (1 + 0.05 * rng.normal())),
}


@pytest.mark.parametrize("kind", METRICS)
@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(exponent=st.floats(-3, 3), sign=st.sampled_from([-1, 1]), seed=st.integers(0, 99), shift=st.floats(-10, 10))
def test_verdicts_do_not_depend_on_units(kind, exponent, sign, seed, shift):
    own, test = METRICS[kind](np.random.default_rng(seed), 400)
    by = sign * 10.0**exponent
    plain = swap(answers(own, test), TWO)
    scaled = swap(answers(by * own, by * test), TWO)
    assert scaled.verdicts == plain.verdicts
    np.testing.assert_allclose(scaled.drops / scaled.tolerance, plain.drops / plain.tolerance, rtol=1e-6)
    given = swap(answers(own, test), TWO, spread=1.0)
    moved = swap(answers(own + shift, test + shift), TWO, spread=1.0)
    assert moved.verdicts == given.verdicts


def test_a_change_for_the_better_is_named_as_one():
    """Only where that is known to be one, under every solver that counts, and by numbers; it is no ODE all the same."""
    rng = np.random.default_rng(0)
    own = rng.gamma(2.0, size=2000)
    metric = lambda change: answers(own, own + change * (1 + 0.1 * rng.normal(size=2000)))
    for better, sign in (("higher", 1), ("lower", -1)):
        good = swap(metric(0.3 * sign), TWO, better=better)
        assert good.verdicts == ["better under finer solvers"]
        assert not good.valid
        assert "not the ODE that its training solver saw" in str(good)
        assert swap(metric(-0.3 * sign), TWO, better=better).verdicts == ["not an ODE"]
        assert swap(metric(0.0), TWO, better=better).verdicts == ["an ODE"]
        assert swap(answers(own, np.full(2000, np.inf * sign)), TWO, better=better).verdicts == ["not an ODE"]
    unknown = swap(metric(0.3), TWO)
    assert unknown.verdicts == ["not an ODE"]
    assert "The metric rises under finer solvers" in str(unknown)
    assert "rises" not in str(swap(metric(0.0), TWO))
    three = [*TWO, jode.Fixed(jode.dopri5, 8)]
    mixed = lambda solver: own + {1: 0.0, 4: 0.3, 5: -0.3}[solver.method.order]
    assert swap(mixed, three, better="higher").verdicts == swap(mixed, three, better="lower").verdicts == ["not an ODE"]
    assert "rises or falls" in str(swap(mixed, three))
    noise = 3 * rng.normal(size=2000)
    unsure = lambda solver: own + {1: 0.0, 4: 0.3, 5: noise}[solver.method.order]
    assert swap(unsure, three, better="higher").verdicts == ["better under finer solvers"]
    with pytest.raises(ValueError, match="better must be"):
        swap(metric(0.3), TWO, better="up")


def test_what_is_asked_is_said():
    """A regression that fits to a hundredth of its outputs' spread: outputs agree, and the loss is another."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=5000)
    ends = lambda solver: (true + 0.01 * (1 + (solver.method is jode.euler)))[:, None]
    loss = lambda solver: (ends(solver)[:, 0] - true + 0.01 * rng.normal(size=5000)) ** 2
    outputs, metric = agreement(ends, TWO, reference=TWO[1]), swap(loss, TWO, better="lower", of="the regression")
    assert outputs.overall == "agrees"
    assert metric.verdicts == ["better under finer solvers"]
    assert str(outputs).startswith("Do the outputs of the model stay where they are under finer solvers?")
    assert str(metric).startswith("Does the mean metric of the regression stay as it is under finer solvers?")


def test_a_network_is_asked_for_each_reading_of_its_weights():
    """Layers w, -w, w, … of x' = w² x / 32 to t = 8: constant within layers x grows by e^(1/4), on lines between them by e^(1/12)."""
    weights, x = jnp.where(jnp.arange(64) % 2 == 0, 1.0, -1.0), jnp.linspace(1.0, 3.0, 5000)
    block, net, verdicts = lambda t, x, w: w**2 * x / 32, jode.Fixed(jode.euler, 64), {}
    for degree in (0, 1):
        F = jode.depth.field(block, degree=degree, span=8.0)
        run = jax.jit(lambda s, F=F: jax.vmap(lambda x: jode.odeint(F, x, (0.0, 8.0), weights, solver=s)[-1])(x))
        np.testing.assert_allclose(run(net)[:9], jax.vmap(lambda x: jode.resnet(block, x, weights, span=8.0))(x[:9]), rtol=1e-12)
        table = swap(run, [net, jode.Fixed(jode.rk4, 256)], of=F)
        verdicts[degree] = table.verdicts
        assert f"(degree {degree}) stay as it is" in str(table)
    assert verdicts == {0: ["an ODE"], 1: ["not an ODE"]}


def power(flips, tolerance, n, confidence):
    """Whether n examples suffice: the interval of the expected counts lies well on one side."""
    change = abs(flips[1] - flips[0])
    half = 2.6 * np.sqrt((sum(flips) + 1 / n) / n) + 4 / n
    return abs(change - tolerance) > 2.2 * half


@pytest.mark.parametrize("n", [300, 3000, *(pytest.param(n, marks=pytest.mark.sweep) for n in (100, 1000, 10_000))])
@pytest.mark.parametrize(
    "flips",
    # (right to wrong, wrong to right), as rates per example; the tolerance is 0.02
    [(0.0, 0.0), (0.004, 0.004), (0.01, 0.0), (0.0199, 0.0), (0.0201, 0.0), (0.04, 0.005), (0.08, 0.01), (0.03, 0.2)],
    ids=str,
)
def test_the_stated_confidence_is_kept(flips, n):
    """Forty cases whose truth is known: at most 5 % of verdicts are wrong, and where n suffices few are undecided."""
    rng, runs = np.random.default_rng(n), 200
    truth = "an ODE" if abs(flips[1] - flips[0]) <= 0.02 else "not an ODE"
    verdicts = []
    for _ in range(runs):
        own = rng.random(n) < 0.5
        u = rng.random(n)
        test = np.where(own, u >= 2 * flips[0], u < 2 * flips[1])  # half of the examples can flip either way
        verdicts += swap(answers(own, test), TWO).verdicts
    wrong = sum(v not in (truth, "undecided") for v in verdicts)
    assert wrong <= 0.05 * runs
    if power(flips, 0.02, n, 0.95):
        assert verdicts.count("undecided") <= 0.1 * runs


def test_an_undecided_verdict_says_how_many_examples_would_decide():
    rng = np.random.default_rng(1)
    case = lambda n: ((own := rng.random(n) < 0.9), own & (rng.random(n) >= 0.012))
    few = swap(answers(*case(200)), TWO)
    assert few.verdicts == ["undecided"]
    assert not few.valid
    assert 200 < few.wanted[0] < 1e5
    assert "would decide" in str(few)
    many = swap(answers(*case(int(6 * few.wanted[0]))), TWO)
    assert many.verdicts == ["an ODE"]
    assert many.wanted[0] == 0


@pytest.mark.parametrize(("better", "worse", "n"), [(0, 0, 44), (1, 0, 44), (4, 1, 1000), (30, 10, 100), (0, 100, 100)])
def test_the_score_interval_inverts_mcnemars_test(better, worse, n):
    """Zero lies in it just where |b - w| ≤ z √(b + w); it turns over with the sign."""
    low, high = paired.tango(better, worse, n, 0.95)
    assert (low <= 0 <= high) == (abs(better - worse) <= 1.959964 * np.sqrt(better + worse))
    np.testing.assert_allclose(paired.tango(worse, better, n, 0.95), (-high, -low), atol=1e-9)
    assert low - 1e-9 <= (better - worse) / n <= high + 1e-9


def test_intervals_hold_together():
    """With more solvers the interval of each widens, as Bonferroni says."""
    own = np.random.default_rng(0).normal(size=500)
    metric = lambda solver: own + 0.01 * solver.steps
    one = swap(metric, [jode.Fixed(jode.euler, 2), jode.Fixed(jode.euler, 4)])
    five = swap(metric, [jode.Fixed(jode.euler, 2**k) for k in range(1, 7)])
    assert five.high[0, 1] - five.low[0, 1] > one.high[0, 1] - one.low[0, 1]


def test_the_interval_of_numbers_is_the_paired_t_interval_and_what_n_examples_cannot_show():
    rng = np.random.default_rng(0)
    own, test = rng.normal(size=500), rng.normal(size=500)
    half = scipy.stats.ttest_rel(test, own).confidence_interval(0.95)
    unseen = np.ptp([own, test]) * (1 - 0.025 ** (1 / 500))
    found = paired.change(own, test, 0.95)
    np.testing.assert_allclose([found.low, found.high], [half.low - unseen, half.high + unseen], rtol=1e-9)


@pytest.mark.parametrize(("n", "rate", "jump"), [(100, 0.01, 5.0), (300, 0.004, 20.0), (1000, 0.004, 6.0), (3000, 0.01, 3.0)])
def test_rare_and_large_changes_are_not_overlooked(n, rate, jump):
    """The mean changes by more than the tolerance, through few examples: often none of them is among n."""
    rng, wrong = np.random.default_rng(3), 0
    for _ in range(200):
        own = rng.normal(size=n)
        wrong += swap(answers(own, own + jump * (rng.random(n) < rate)), TWO).valid
    assert wrong <= 10


def test_few_examples_decide_nothing():
    for values in ([1.0], [True], [0.3, 0.7], [0.2, 0.5, 0.9], [True] * 50):
        assert swap(answers(np.array(values), np.array(values)), TWO).verdicts == ["undecided"], values
    for n in (20, 50, 150):  # all right: 189 examples bring z² / (n + z²) to 0.02
        assert swap(answers(np.ones(n, bool), np.ones(n, bool)), TWO).wanted[0] == pytest.approx(189, rel=0.03)
    at_the_tolerance = np.arange(50) != 7
    assert np.isinf(swap(answers(np.ones(50, bool), at_the_tolerance), TWO).wanted[0])
    assert swap(answers(np.ones(500), np.full(500, 1.001)), TWO).verdicts == ["an ODE"]  # two constants: 0.1 % of their size


@pytest.mark.parametrize("bad", [np.array([1.0, np.nan]), np.array([]), np.ones((2, 2))], ids=["NaN", "empty", "matrix"])
def test_a_metric_that_cannot_be_judged_is_refused(bad):
    with pytest.raises(ValueError, match="metric"):
        swap(answers(bad, bad), TWO)
    with pytest.raises(ValueError, match="as many numbers"):
        swap(answers(np.ones(3), np.ones(4)), TWO)


def spinning(solver, turn=2.0):
    """Where a rotation takes points of the plane."""
    x = jax.random.normal(jax.random.key(0), (600, 2))
    f = lambda t, y, a: turn * jnp.stack([-y[1], y[0]])
    return jax.vmap(lambda x: jode.odeint(f, x, (0.0, 1.0), solver=solver)[-1])(x)


def test_errors_of_solvers_are_measured():
    """Eight midpoint steps err as much as 32 of Euler's by h^p, and three times less on a rotation."""
    solvers = [jode.Fixed(jode.euler, 32), jode.Fixed(jode.midpoint, 6), jode.Fixed(jode.midpoint, 4), jode.Fixed(jode.rk4, 1)]
    errors = measured_errors(spinning, solvers)
    # The relative error of one step is (turn h)^(p+1) / (p+1)!, and there are 1/h of them: of the whole rotation √2 for √2.
    theory = [2**2 / 2 / 32, 2**3 / 6 / 36, 2**3 / 6 / 16, 2**5 / 120]
    np.testing.assert_allclose(errors[:3], theory[:3], rtol=0.25)
    quiet = lambda solver: np.ones(600)
    measured = swap(quiet, solvers, outputs=spinning)
    assert measured.counts[0].tolist() == [False, True, False, False]
    np.testing.assert_allclose(measured.errors[0], errors)
    with pytest.raises(ValueError, match="reference solver"):
        measured_errors(spinning, solvers, reference=jode.Adaptive(max_steps=1))


def test_agreement_sees_what_accuracy_misses():
    """Two coarse steps turn and stretch every point, along the decision boundary: no label flips, and all outputs move."""
    coarse, fine = jode.Fixed(jode.euler, 4), jode.Fixed(jode.rk4, 32)
    f = lambda t, y, a: jnp.stack([jnp.zeros_like(y[0]), -3 * y[1]])  # only the second coordinate moves
    x = jax.random.normal(jax.random.key(1), (600, 2))
    ends = lambda solver: jax.vmap(lambda x: jode.odeint(f, x, (0.0, 1.0), solver=solver)[-1])(x)
    labels = lambda y: y[:, 0] > 0
    right = lambda solver: labels(ends(solver)) == labels(x)
    assert swap(right, [coarse, fine], outputs=ends).verdicts == ["an ODE"]
    found = agreement(ends, [coarse, fine], labels=labels)
    assert found.overall == "differs"
    assert not found.valid
    assert found.flips.tolist() == [0.0]
    assert "differs" in str(found)
    close = agreement(ends, [jode.Fixed(jode.euler, 512), fine, coarse], labels=labels)
    assert close.valid
    assert close.verdicts == ["agrees", "untested"]
    assert close.errors[0] < 0.01 < close.errors[2]


def test_flips_are_counted():
    scores = lambda solver: np.stack([np.ones(400), np.where(np.arange(400) < (40 if solver.steps == 4 else 0), 2.0, 0.0)], 1)
    found = agreement(
        scores, [jode.Fixed(jode.euler, 2), jode.Fixed(jode.euler, 4)], labels=lambda s: np.argmax(s, 1), reference=TWO[1]
    )
    assert found.flips.tolist() == [0.1]
    low, high = found.flip_ends[0]
    assert 0.06 < low < 0.1 < high < 0.15


def test_several_models_make_a_cross_table():
    table = swap(dict.fromkeys(SOLVERS[:2], decay), SOLVERS, spread=1.0, tolerance=0.2)
    assert table.table.shape == (2, 4)
    assert table.valid.tolist() == [False, True]
    np.testing.assert_allclose(table.drops, [np.exp(-1), np.exp(-1) - 0.25], atol=0.02)


def test_a_metric_that_is_not_finite_is_no_ode():
    assert not swap(lambda s: jnp.nan if s.method is jode.midpoint else 1.0, SOLVERS[:3]).valid


def test_a_model_that_nothing_finer_tested_is_not_called_an_ode():
    table = swap(decay, [jode.Fixed(jode.euler, 100), jode.Fixed(jode.euler, 2)])
    assert table.verdicts == ["untested"]
    assert not table.valid


def test_swap_compiles_once_a_method():
    traces = []

    @jax.jit
    def metric(solver):
        traces.append(solver.method)
        return decay(solver)

    swap(metric, [jode.Fixed(m, n) for m in (jode.euler, jode.midpoint) for n in (1, 2, 4, 8)])
    assert len(traces) == 2


@pytest.mark.parametrize("critical", [1, 2, 3, 37, 64, 512])
def test_the_critical_step_is_bracketed(critical):
    bad, good = critical_steps(lambda n: n >= critical, ratio=1.0).bracket
    assert good == critical
    assert bad == (critical - 1 or None)
    wide = critical_steps(lambda n: n >= critical, ratio=2.0)
    assert wide.bracket[1] <= max(2 * (wide.bracket[0] or 1), 1)
    assert len(wide.tried) <= 11


def test_no_valid_step_count_is_said():
    assert critical_steps(lambda n: False, most=64).bracket == (64, None)
    with pytest.raises(ValueError, match="fewest <= most"):
        critical_steps(lambda n: True, fewest=0)


# Adaptation: what the algorithm decides, given what the metric says.


def at(h, accuracy, tested, grown=None, **fields):
    """One due update from step h, under a metric that answers by method; the new step."""
    adapt = StepAdaptation(every=1, **fields)

    def metric(solver):
        return jnp.float32(tested if solver.method is adapt.test else tested if grown is None else grown)

    state, check = jax.jit(lambda: adapt.update(StepState(jnp.float32(h), jnp.int32(0)), accuracy, metric))()
    assert check.checked
    return float(state.h)


def test_a_step_that_disagrees_is_halved_and_one_that_agrees_grows():
    assert at(0.1, accuracy=0.9, tested=0.7) == pytest.approx(0.05)
    assert at(0.1, accuracy=0.9, tested=0.85) == pytest.approx(0.11)
    assert at(0.1, accuracy=0.9, tested=0.85, grown=0.7) == pytest.approx(0.1)
    assert at(0.95, accuracy=0.9, tested=0.9) == 1.0
    assert at(0.1, accuracy=0.9, tested=np.nan) == pytest.approx(0.05)


def test_steps_approach_their_bound_by_halves():
    assert 1 / at(1 / 300, accuracy=0.9, tested=0.5) == pytest.approx(400, rel=1e-4)
    assert 1 / at(1 / 500, accuracy=0.9, tested=0.5) == pytest.approx(500, rel=1e-4)


def test_the_test_solver_errs_fifty_times_less():
    adapt = StepAdaptation()
    of = lambda n: int(adapt.tester(adapt.init(1 / n)).steps)
    assert [of(n) for n in (1, 2, 10, 50, 200)] == [8, 10, 23, 50, 200]  # ⌈√(50 n)⌉, and n itself beyond 50
    assert int(adapt.solver(adapt.init(1 / 50)).steps) == 50
    assert int(adapt.solver(adapt.init(0.3)).steps) == 4
    assert int(StepAdaptation(method=jode.midpoint, test=jode.rk4).tester(adapt.init(1 / 4)).steps) == 6  # (800)^(1/4)


@pytest.mark.parametrize("iteration", [0, 94, 95, 99])
def test_the_end_settles_on_the_fine_side(iteration):
    """In the last twentieth steps never grow, and a smaller change halves them."""
    adapt = StepAdaptation(every=1, iterations=100)
    new = lambda tested: float(
        adapt.update(StepState(jnp.float32(0.1), jnp.int32(iteration)), 0.9, lambda solver: jnp.float32(tested))[0].h
    )
    last = iteration >= 95
    assert new(0.9) == pytest.approx(0.1 if last else 0.11)
    assert new(0.86) == pytest.approx(0.05 if last else 0.11)
    assert new(0.7) == pytest.approx(0.05)


def test_only_every_fiftieth_iteration_looks():
    adapt = StepAdaptation()
    _, looked = jax.lax.scan(
        lambda s, _: (lambda s, c: (s, (c.checked, s.h)))(*adapt.update(s, jnp.float32(1.0), lambda solver: jnp.float32(1.0))),
        adapt.init(0.1),
        None,
        length=120,
    )
    assert np.flatnonzero(looked[0]).tolist() == [49, 99]
    assert looked[1][-1] == pytest.approx(0.121)


def test_tolerance_adaptation_decides_likewise():
    adapt = ToleranceAdaptation(every=1)

    def once(tested, nfe_test, nfe_grown, history=0.0):
        seen = []

        def metric(solver):
            if solver.method is adapt.test:
                jax.debug.callback(lambda r: seen.append(float(r)), solver.rtol)
                return tested, nfe_test(solver.rtol)
            return 0.9, nfe_grown

        state = adapt.init(1e-3)._replace(history=jnp.full(5, history, jnp.float32))
        state, _ = jax.jit(lambda: adapt.update(state, 0.9, 20.0, metric))()
        jax.effects_barrier()
        return float(state.tol), seen

    assert once(0.9, lambda tol: 30.0, 18.0)[0] == pytest.approx(1.1e-3)
    assert once(0.5, lambda tol: 30.0, 18.0)[0] == pytest.approx(0.5e-3)
    assert once(0.9, lambda tol: 30.0, 20.0, history=20.0)[0] == pytest.approx(1e-3)  # as many evaluations as ever: refused
    _, seen = once(0.9, lambda tol: jnp.where(tol < 1e-5, 30.0, 10.0), 18.0)
    np.testing.assert_allclose(sorted(seen, reverse=True), [2e-4, 2e-5, 2e-6], rtol=1e-4)  # until it takes more evaluations


def test_first_step_is_hairers():
    # y' = y from ‖y‖ = 1: d0 = d1 = d2 = 1, so h_a = 0.01, h_b = 0.01^(1/2) and h = min(1, 0.1).
    y0 = jnp.stack([jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])])
    np.testing.assert_allclose(first_step(lambda t, y, a: y, y0), 0.1, rtol=1e-6)
    assert first_step(lambda t, y, a: 1e-9 * y, y0) <= 1.0
    assert np.isfinite(first_step(lambda t, y, a: 0 * y, y0))


# Training with adaptation: traced once, resumed bit for bit.

OPTIMIZER = optax.adam(1e-3)
ADAPT = StepAdaptation(every=2)
TRACES = []


def logits(w, x, solver):
    return w.logits(x, solver, jode.MemoryFree(max_drift=10.0))


def iteration(carry, batch):
    TRACES.append(1)
    return train.adapted(ADAPT, logits, OPTIMIZER)(carry, batch)


@pytest.fixture
def standard_promotion():
    """Optax promotes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("standard_promotion")
def test_one_trace_serves_every_step_count_and_training_resumes_bit_for_bit():
    w = Planar(width=8, key=jax.random.key(0))
    x, y = data.spheres(jax.random.key(1), 24 * 16)
    batches = x.reshape(24, 16, 2), y.reshape(24, 16)
    start = (w, OPTIMIZER.init(w), ADAPT.init(1 / 40))
    step = jax.jit(iteration)
    carry, counts, kept = start, [], None
    for k in range(24):
        kept = carry if k == 13 else kept
        carry, (n, *_) = step(carry, (batches[0][k], batches[1][k]))
        counts.append(int(n))
    assert len(TRACES) == 1
    assert np.sum(np.diff(counts) != 0) >= 5
    saved = jax.tree.map(np.asarray, kept)  # what a checkpoint holds
    again = jax.tree.map(jnp.asarray, saved)
    for k in range(13, 24):
        again, _ = step(again, (batches[0][k], batches[1][k]))
    for a, b in zip(jax.tree.leaves(carry), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


# Crossings, convergence, local errors.


def test_coarse_paths_cross_and_fine_ones_do_not():
    spin = lambda t, y, a: jnp.stack([-y[1], y[0]]) * 2 * jnp.pi - 0.3 * y
    start = jnp.stack([jnp.array([r * np.cos(a), r * np.sin(a)]) for r, a in ((0.7, 0.0), (0.6, np.pi / 3))])
    paths = lambda n: jax.vmap(lambda y: jode.odeint(spin, y, jnp.linspace(0, 1, n + 1), solver=jode.Fixed(jode.rk4, 1)))(start)
    assert not crossings(paths(64)).any()
    assert crossings(paths(3))[0, 1]
    wild = jax.vmap(lambda y: jode.odeint(lambda t, y, a: -3 * y, y, (0.0, 0.5, 1.0), solver=jode.Fixed(jode.euler, 1)))
    found = crossings(wild(jnp.array([[1.0], [2.0]])))  # each step turns the line over
    assert found.tolist() == [[False, True], [True, False]]
    with pytest.raises(ValueError, match="d = 1 or 2"):
        crossings(jnp.zeros((4, 5, 3)))


def test_convergence_tells_a_flow_from_a_map():
    outcome = lambda solver: jode.odeint(lambda t, y, a: -3 * y, jnp.ones(()), (0.0, 1.0), solver=solver)[-1]
    truth = 0.2  # data that the flow misses by a little
    flow = convergence(lambda s: abs(outcome(s) - truth), jode.rk4, [4, 8, 16, 32, 64])
    assert flow.valid
    assert flow.order == pytest.approx(4, abs=0.4)
    coarse = convergence(lambda s: abs(outcome(s) - outcome(jode.Fixed(jode.euler, 4))) + 1e-3, jode.euler, [4, 8, 16, 32, 64])
    assert not coarse.valid
    assert not coarse.plateau
    assert coarse.order == pytest.approx(1, abs=0.2)
    assert "not an ODE" in str(coarse)
    with pytest.raises(ValueError, match="twice the last"):
        convergence(lambda s: 0.0, jode.euler, [1, 2, 3, 4])


@pytest.mark.parametrize("method", [jode.euler, jode.heun, jode.rk4], ids=str)
def test_local_errors_are_those_of_the_steps(method):
    f, n = lambda t, y, a: -a * y, 8
    found = local_errors(f, jnp.array([1.0, 2.0]), (0.0, 1.0), 0.7, solver=jode.Fixed(method, n))
    ys = jode.odeint(f, jnp.array([1.0, 2.0]), jnp.linspace(0, 1, n + 1), 0.7, solver=jode.Fixed(method, 1))
    true = np.linalg.norm(ys[1:] - ys[:-1] * np.exp(-0.7 / n), axis=1)
    np.testing.assert_allclose(found, true, rtol=0.15)


def test_only_a_gradient_must_know_how_many_states_to_store():
    w = Planar(width=4, key=jax.random.key(0))
    x = jnp.ones((3, 2))
    value = lambda w, n: jnp.sum(w.logits(x, jode.Fixed(jode.euler, n)))  # with Backprop(None)
    np.testing.assert_allclose(jax.jit(value)(w, 5), value(w, 5), rtol=1e-6)
    with pytest.raises(ValueError, match="cannot know how many states"):
        jax.jit(jax.grad(value))(w, 5)


def test_the_same_solver_written_otherwise_is_no_test():
    assert swap(decay, [jode.Fixed(jode.euler, 16), jode.Fixed(jode.euler, 16, max_steps=99)]).verdicts == ["untested"]
    adapt = StepAdaptation()
    table = swap(decay, [adapt.solver(adapt.init(1 / 16)), jode.Fixed(jode.rk4, 16)])  # with a count that is an array
    assert table.verdicts == ["not an ODE"]  # 0.356 for 0.368


@pytest.mark.parametrize(
    ("errors", "trained", "valid"),
    [
        ([1e7, 1, 0.99, 1.05, 1], 8, False),  # no order
        ([np.nan, 1, 1, 1, 1], 8, True),  # coarser than in training
        ([1.1, 1.1, 1.1, 1.1, 1.18], 4, False),  # one gap, and it grows
        ([1.0, 1.0, 1.0, np.inf], 4, False),
        ([1.0, 1.04, 1.06, 1.07, 1.075], 4, True),
    ],
)
def test_verdicts_on_sequences_of_errors(errors, trained, valid):
    steps = [4 * 2**k for k in range(len(errors))]
    assert convergence(lambda s: errors[steps.index(s.steps)], jode.euler, steps, trained=trained).valid == valid


def test_a_last_training_step_leaves_nothing_to_test():
    with pytest.raises(ValueError, match="finer ones after it"):
        convergence(lambda s: 1.0, jode.euler, [1, 2, 4, 8], trained=8)


def test_touching_is_not_crossing():
    rays = jnp.linspace(1, 0.1, 9)[None, :, None] * jnp.array([[[1.0, 0.3]], [[0.5, 0.15]]])
    assert not crossings(rays).any()
    assert not crossings(jnp.array([[[1.0], [0.0]], [[0.5], [1e-7]]])).any()


def test_steps_and_tolerances_stay_in_their_bounds():
    assert int(StepAdaptation().solver(StepAdaptation().init(jnp.nan)).steps) == 500
    adapt = ToleranceAdaptation(every=1)
    worse = lambda solver: (jnp.float32(0.0), jnp.float32(1e9))
    state, _ = jax.lax.scan(lambda s, _: adapt.update(s, 1.0, 1.0, worse), adapt.init(1e-3), None, length=60)
    assert state.tol == pytest.approx(1e-7)
