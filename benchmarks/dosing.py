"""Twelve doses for each of 1,000 patients, with schedules and rates of their own: what do resets of the state cost?

Two compartments, dy/dt = M(p) y; a dose adds to the first. diffrax cannot reset a state within a solve. It gets the scan of twelve
solves from dose to dose, and one solve of u = y - (doses so far, 0), whose field jumps (`jump_ts`): there the gradient by the times of
doses is wrong. Errors are against the matrix exponential in float64.

python -m benchmarks.dosing
"""

from benchmarks.measure import compiled, race, report  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jode

TOL, END, DOSES = 1e-6, 24.0, 12
SPREADS = {"20 %": (0.2, 0), "a factor of ten": (0, np.log(10) / 2)}  # of the rates: normal, and uniform, in their logarithms


def main(quick=False):
    rows, rng = [], np.random.default_rng(0)
    patients = 100 if quick else 1000
    times = np.sort(np.linspace(0, 22, DOSES) + rng.uniform(0, 1.5, (patients, DOSES)), axis=1)
    amounts = rng.uniform(1, 2, (patients, DOSES))
    for spread, (normal, uniform) in SPREADS.items():
        wide = normal * rng.normal(size=(patients, 3)) + uniform * rng.uniform(-1, 1, (patients, 3))
        x = [jnp.asarray(v, jnp.float32) for v in (np.array([0.3, 0.5, 0.4]) * np.exp(wide), times, amounts)]
        for saves in (1, 24):
            saved = jnp.linspace(0, END, saves + 1)[1:].astype(jnp.float32)
            for what, task in {"forward": forward, "gradient": gradient}.items():
                with jax.enable_x64(True):
                    true = task(lambda *x: closed_form(*x, jnp.asarray(saved, float)))(*(jnp.asarray(v, float) for v in x))
                    true = [np.asarray(v) for v in jax.tree.leaves(true)]
                programs, costs = {}, {}
                for peer, solve in contestants(saved, most_steps(*x)).items():
                    programs[peer], costs[peer] = compiled(task(solve), *x, quick=True)
                found = race(programs, *x, repeats=5 if quick else 11, seconds=0.3 if quick else 2.0)
                for peer, seconds in found.items():
                    errors = [apart(a, b) for a, b in zip(jax.tree.leaves(programs[peer](*x)), true, strict=True)]
                    errors = ", ".join(f"{e:.0e}" for e in errors)
                    ratio = f"{seconds / found['jode, jumps']:.2f}"
                    row = [spread, saves, what, peer, f"{seconds * 1e3:.2f}", ratio, errors, f"{costs[peer]:.2f}"]
                    rows.append(row)
                    print(*row, flush=True)
    columns = [
        "rates differ by",
        "save times",
        "what",
        "solver",
        "ms",
        "time / jode",
        "relative error (by rates, times, amounts)",
        "compile s",
    ]
    report(
        "dosing",
        f"Twelve doses, {patients} patients: Tsit5 at {TOL:g}, float32; the gradient is that of Σ y²",
        columns,
        rows,
        quick,
    )


def forward(solve):
    return jax.vmap(solve)


def gradient(solve):
    return jax.grad(lambda *x: jnp.sum(jax.vmap(solve)(*x) ** 2), (0, 1, 2))


def apart(x, true):
    return np.linalg.norm(np.asarray(x, float) - true) / np.linalg.norm(true)


def f(t, y, p):
    return jnp.stack([-(p[0] + p[1]) * y[0] + p[2] * y[1], p[1] * y[0] - p[2] * y[1]])


def closed_form(p, times, amounts, saved):
    m = jnp.stack([jnp.stack([-(p[0] + p[1]), p[2]]), jnp.stack([p[1], -p[2]])])

    def at(t):
        since = t - times
        after = jax.vmap(lambda s: jax.scipy.linalg.expm(m * s)[:, 0])(jnp.maximum(since, 0))
        return jnp.sum(jnp.where(since > 0, amounts, 0)[:, None] * after, axis=0)

    return jax.vmap(at)(saved)


def most_steps(p, times, amounts):
    """How many steps diffrax takes at most, from dose to dose and in all: the least max_steps that serve all patients."""

    def steps(y0, ts, p):
        return diffrax_solve(f, y0, ts, p, PIECE, diffrax.SaveAt(t1=True)).stats["num_steps"]

    ends = jnp.append(times[:, 1:], jnp.full((len(times), 1), END, times.dtype), axis=1)
    spans = jnp.stack([times, ends], axis=-1)
    y0 = jnp.array([5.0, 5.0], times.dtype)
    counts = jax.jit(jax.vmap(lambda p, spans: jax.vmap(lambda ts: steps(y0, ts, p))(spans)))(p, spans)
    return int(jnp.max(counts)) + 4, int(jnp.max(jnp.sum(counts, axis=1))) + 4 * DOSES


PIECE = diffrax.PIDController(rtol=TOL, atol=TOL)


def diffrax_solve(f, y0, ts, p, controller, saveat, max_steps=4096):
    adjoint = (
        diffrax.RecursiveCheckpointAdjoint(checkpoints=max_steps) if max_steps < 4096 else diffrax.RecursiveCheckpointAdjoint()
    )
    given = {"stepsize_controller": controller, "saveat": saveat, "max_steps": max_steps, "adjoint": adjoint, "throw": False}
    return diffrax.diffeqsolve(diffrax.ODETerm(f), diffrax.Tsit5(), ts[0], ts[-1], None, y0, p, **given)


def contestants(saved, most):
    """Functions of one patient's (rates, times, amounts) -> states at the times saved."""
    solver = jode.Adaptive(jode.tsit5, TOL, TOL)
    start, zero = jnp.zeros(2, jnp.float32), jnp.zeros(1, jnp.float32)

    def jumps(p, times, amounts):
        add = lambda t, y, p, x: y.at[0].add(x)
        return jode.odeint(f, start, jnp.concatenate([zero, saved]), p, solver=solver, jumps=(times, add, amounts))[1:]

    def scanned(piece):
        """From dose to dose: each piece gives the states at the times saved within it, and the last."""

        def run(p, times, amounts):
            ends = jnp.append(times[1:], jnp.float32(END))

            def body(carry, x):
                y, out = carry
                a, b, dose = x
                ts = jnp.concatenate([a[None], jnp.clip(saved, a, b), b[None]]) if len(saved) > 1 else jnp.stack([a, b])
                ys = piece(y.at[0].add(dose), ts, p)
                if len(saved) > 1:
                    out = jnp.where(((saved > a) & (saved <= b))[:, None], ys[1:-1], out)
                return (ys[-1], out), None

            out = jnp.zeros((len(saved), 2), jnp.float32)
            y, out = jax.lax.scan(body, (start, out), (times, ends, amounts))[0]  # before the first dose there is nothing
            return out if len(saved) > 1 else y[None]

        return run

    def by_jode(y, ts, p):
        return jode.odeint(f, y, ts, p, solver=solver)

    def by_diffrax(max_steps):
        def piece(y, ts, p):
            saveat = diffrax.SaveAt(ts=ts) if len(saved) > 1 else diffrax.SaveAt(t1=True)
            return diffrax_solve(f, y, ts, p, PIECE, saveat, max_steps).ys

        return piece

    def by_jump_ts(p, times, amounts):
        given = lambda t: jnp.stack([jnp.sum(jnp.where(t >= times, amounts, 0)), jnp.zeros((), jnp.float32)])
        field = lambda t, u, p: f(t, u + given(t), p)
        controller = diffrax.ClipStepSizeController(PIECE, jump_ts=times)
        us = diffrax_solve(field, start, (0.0, END), p, controller, diffrax.SaveAt(ts=saved), most[1]).ys
        return us + jax.vmap(given)(saved)

    return {
        "jode, jumps": jumps,
        "jode, scan of 12 solves": scanned(by_jode),
        "diffrax, scan, default": scanned(by_diffrax(4096)),
        "diffrax, scan, tuned": scanned(by_diffrax(most[0])),
        "diffrax, jump_ts, tuned": by_jump_ts,
    }


if __name__ == "__main__":
    main()
