"""1,000 balls of ten bounces, 1,000 neurons of up to 32 spikes: what does a solve cost that resets the state at events?

Peers end a solve at an event: they get the scan of as many solves as the row with most events needs, and so does jode once more. A
terminating event inside of a user's own loop is that scan. Errors are against closed forms.

python -m benchmarks events
"""

from benchmarks.measure import compiled, race, report  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix

import jode

TOL, MOST = 1e-8, 64
SOLVER = jode.Adaptive(jode.tsit5, TOL, TOL)


class Balls:
    """(height, speed) at the end, by height at the start, gravity and restitution."""

    name, end, direction, events = "balls", 2.4, -1, 11

    @staticmethod
    def drawn(rng, rows):
        return np.stack([rng.uniform(*x, rows) for x in ((0.29, 0.31), (9.7, 9.9), (0.84, 0.86))], 1)

    start = staticmethod(lambda p: jnp.stack([p[0], 0 * p[0]]))
    field = staticmethod(lambda t, y, p: jnp.stack([y[1], -p[1]]))
    g = staticmethod(lambda t, y, p: y[0])
    reset = staticmethod(lambda t, y, p: jnp.stack([0 * y[0], -p[2] * y[1]]))

    @staticmethod
    def exact(p):
        k = jnp.arange(1.0, 30)
        first, speed = jnp.sqrt(2 * p[0] / p[1]), jnp.sqrt(2 * p[0] * p[1])
        times = first + 2 * first * jnp.cumsum(jnp.concatenate([jnp.zeros(1), p[2] ** k]))
        n = jnp.sum(times < Balls.end)
        s, v = Balls.end - times[n - 1], speed * p[2] ** n
        return jnp.stack([v * s - p[1] * s * s / 2, v - p[1] * s]), n


class Neurons:
    """The voltage at the end, by time constant, current and threshold: τ v' = I - v, reset to zero at the threshold."""

    name, end, direction, events = "neurons", 3.0, 1, 32

    @staticmethod
    def drawn(rng, rows):
        return np.stack([rng.uniform(*x, rows) for x in ((0.18, 0.22), (1.2, 2.2), (0.95, 1.0))], 1)

    start = staticmethod(lambda p: jnp.zeros(1))
    field = staticmethod(lambda t, y, p: (p[1] - y) / p[0])
    g = staticmethod(lambda t, y, p: y[0] - p[2])
    reset = staticmethod(lambda t, y, p: 0 * y)

    @staticmethod
    def exact(p):
        between = p[0] * jnp.log(p[1] / (p[1] - p[2]))
        n = jnp.floor(Neurons.end / between)
        s = Neurons.end - jax.lax.stop_gradient(n) * between
        return (p[1] * (1 - jnp.exp(-s / p[0])))[None], n.astype(int)


def contestants(case):
    """Functions of one row's parameters -> the state at the end."""
    event = jode.Event(case.g, case.direction)
    resets = jode.Event(case.g, case.direction, reset=case.reset)

    def in_one(p):
        return jode.solve(case.field, case.start(p), (0.0, case.end), p, solver=SOLVER, observe=resets).ys[-1]

    def scanned(piece):
        """From event to event, as often as a row may need; rows at the end go over no time."""

        def run(p):
            def body(c, _):
                t, y = c
                hit, t1, y1, end = piece(t, y, p)
                after = case.reset(t1, jnp.where(hit, y1, y), p)
                return (jnp.where(hit, t1, case.end), jnp.where(hit, after, jnp.where(hit, y, end))), None

            return jax.lax.scan(body, (jnp.zeros(()), case.start(p)), None, length=case.events + 1)[0][1]

        return run

    def by_jode(t, y, p):
        sol = jode.solve(case.field, y, jnp.stack([t, jnp.asarray(case.end)]), p, solver=SOLVER, observe=event)
        return sol.observed.count > 0, sol.observed.t, sol.observed.y, sol.ys[-1]

    def by_diffrax(most, adjoint):
        root = optimistix.Newton(TOL, TOL)
        found = diffrax.Event(lambda t, y, args, **_: case.g(t, y, args), root, direction=case.direction > 0)
        control = diffrax.PIDController(rtol=TOL, atol=TOL)

        def piece(t, y, p):
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(case.field),
                diffrax.Tsit5(),
                t,
                case.end,
                None,
                y,
                p,
                stepsize_controller=control,
                saveat=diffrax.SaveAt(t1=True),
                max_steps=most,
                adjoint=adjoint,
                event=found,
                throw=False,
            )
            hit = sol.event_mask & (sol.ts[-1] < case.end)
            return hit, sol.ts[-1], sol.ys[-1], sol.ys[-1]

        return piece

    return {
        "jode, reset": in_one,
        "jode, scan": scanned(by_jode),
        "diffrax, scan, default": scanned(by_diffrax(4096, diffrax.RecursiveCheckpointAdjoint())),
        "diffrax, scan, tuned": scanned(by_diffrax(MOST, diffrax.RecursiveCheckpointAdjoint(checkpoints=MOST))),
    }


def main(quick=False):
    rows = []
    with jax.enable_x64(True):
        for case in (Balls, Neurons):
            p = jnp.asarray(case.drawn(np.random.default_rng(0), 100 if quick else 1000))
            counts = np.asarray(jax.vmap(lambda p, case=case: case.exact(p)[1])(p))
            print(f"{case.name}: {counts.min()} to {counts.max()} events")
            for what in ("forward", "gradient"):
                task = jax.vmap if what == "forward" else lambda f: jax.grad(lambda p: jnp.sum(jax.vmap(f)(p) ** 2))
                true = np.asarray(task(lambda p, case=case: case.exact(p)[0])(p))
                programs, costs = {}, {}
                for peer, run in contestants(case).items():
                    programs[peer], costs[peer] = compiled(task(run), p, quick=True)
                found = race(programs, p, repeats=5, seconds=0.5 if quick else 2.0)
                for peer, seconds in found.items():
                    error = np.max(abs(np.asarray(programs[peer](p)) - true)) / np.max(abs(true))
                    ratio = f"{seconds / found['jode, reset']:.2f}"
                    rows.append([case.name, what, peer, f"{seconds * 1e3:.2f}", ratio, f"{error:.0e}", f"{costs[peer]:.2f}"])
                    print(*rows[-1], flush=True)
    columns = ["of", "what", "solver", "ms", "time / jode", "relative error", "compile s"]
    title = f"{len(p)} rows that are reset at events: Tsit5 at {TOL:g}, float64; the gradient is that of Σ y(end)²"
    report("events", title, columns, rows, quick)


if __name__ == "__main__":
    main()
