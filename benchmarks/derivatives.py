"""Derivatives in every mode, of adaptive solves of small systems: what does each cost beside a solve and a gradient?

The bare loop marches state and tangent by hand over as many equal steps as jode accepts (in a batch: as its slowest row does), without
estimating an error. Each mode of diffrax is run with the adjoint that serves it fastest.

python -m benchmarks.derivatives
"""

from functools import partial

from benchmarks.measure import compiled, race, report  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint

import jode
from benchmarks.adaptive_gradient import PROBLEMS

TOL = 1e-6
SAVES = 50


def main(quick=False):
    rows = []
    for name, (slopes, centre, args, t1) in PROBLEMS.items():
        f = lambda t, y, a, slopes=slopes: jnp.stack(slopes(y, a))
        for batch in (1, 1000):
            y0 = centre * jnp.asarray(np.random.default_rng(0).uniform(0.8, 1.2, (batch, len(centre))), jnp.float32)
            y0 = y0[0] if batch == 1 else y0
            one = {}
            for task, derivative in TASKS.items():
                ts = jnp.linspace(0.0, t1, SAVES) if task == "Jacobian of 50 save times" else jnp.array([0.0, t1])
                programs, costs = {}, {}
                for peer, solve in contestants(task, f, ts).items():
                    run = partial(derivative, mapped(solve))
                    programs[peer], costs[peer] = compiled(run, args, y0, quick=quick)
                if task == "forward derivative":
                    bare = by_hand(f, t1, args, y0)
                    programs["bare loop"], costs["bare loop"] = compiled(bare, args, y0, quick=quick)
                times = race(programs, args, y0, repeats=5 if quick else 11, seconds=0.3 if quick else 2.0)
                found = {peer: np.asarray(p(args, y0), float) for peer, p in programs.items()}
                one.setdefault(task, times["jode"])
                for peer, seconds in times.items():
                    apart = np.linalg.norm(found[peer] - found["jode"]) / np.linalg.norm(found["jode"])
                    beside = [f"{seconds / one[x]:.2f}" if x in one else "–" for x in ("solve", "gradient")]
                    ratio = f"{seconds / times['jode']:.2f}"
                    row = [name, batch, task, peer, f"{seconds * 1e3:.3f}", ratio, *beside, f"{apart:.0e}", f"{costs[peer]:.2f}"]
                    rows.append(row)
                    print(*row, flush=True)
    columns = [
        "problem",
        "rows",
        "what",
        "solver",
        "ms",
        "time / jode",
        "/ jode's solve",
        "/ jode's gradient",
        "apart",
        "compile s",
    ]
    report("derivatives", f"Derivatives of Σ y(t1)² by the parameters: Tsit5 at {TOL:g}, float32", columns, rows, quick)


def loss(solve, args, y0):
    return jnp.sum(solve(args, y0)[..., -1, :] ** 2)


def along(args):
    return jnp.cos(jnp.arange(args.size, dtype=args.dtype))


TASKS = {
    "solve": loss,
    "gradient": lambda solve, a, y: jax.grad(partial(loss, solve))(a, y),
    "forward derivative": lambda solve, a, y: jax.jvp(lambda a: loss(solve, a, y), (a,), (along(a),))[1],
    "Hessian times vector": lambda solve, a, y: jax.jvp(lambda a: jax.grad(partial(loss, solve))(a, y), (a,), (along(a),))[1],
    "gradient of gradient": lambda solve, a, y: jax.grad(lambda a: jnp.vdot(along(a), jax.grad(partial(loss, solve))(a, y)))(a),
    "Jacobian of 50 save times": lambda solve, a, y: jax.jacfwd(lambda a: solve(a, y))(a),
}


def contestants(task, f, ts):
    """Solves of one trajectory by package, as functions of (args, y0)."""

    def peer(adjoint, max_steps=4096):
        term, controller = diffrax.ODETerm(f), diffrax.PIDController(TOL, TOL)
        saveat = diffrax.SaveAt(ts=ts)
        given = {"stepsize_controller": controller, "saveat": saveat, "adjoint": adjoint, "max_steps": max_steps}
        return lambda a, y: diffrax.diffeqsolve(term, diffrax.Tsit5(), ts[0], ts[-1], None, y, a, **given).ys

    best = {
        "solve": {"diffrax": peer(diffrax.RecursiveCheckpointAdjoint())},
        "gradient": {"diffrax, RecursiveCheckpointAdjoint": peer(diffrax.RecursiveCheckpointAdjoint(), 256)},
        "forward derivative": {"diffrax, ForwardMode": peer(diffrax.ForwardMode())},
        "Hessian times vector": {"diffrax, DirectAdjoint": peer(diffrax.DirectAdjoint(), 256)},
        "gradient of gradient": {"diffrax, DirectAdjoint": peer(diffrax.DirectAdjoint(), 256)},
        "Jacobian of 50 save times": {"diffrax, ForwardMode": peer(diffrax.ForwardMode())},
    }[task]
    reverse = {}
    if task in ("solve", "gradient", "gradient of gradient") and f(0.0, jnp.ones(3), jnp.ones(4)).size < 3:
        # On Lorenz' equations its backward solve diverges, has no step limit, and does not return.
        reverse = {"jax.experimental.ode": lambda a, y: odeint(lambda y, t, a: f(t, y, a), y, ts, a, rtol=TOL, atol=TOL)}
    return {"jode": lambda a, y: jode.odeint(f, y, ts, a, solver=jode.Adaptive(jode.tsit5, TOL, TOL)), **best, **reverse}


def by_hand(f, t1, args, y0):
    """The tangent of the loss along `along`, over the grids that jode takes, padded with steps of no width."""
    solver = jode.Adaptive(jode.tsit5, TOL, TOL)
    n = int(jnp.max(mapped(lambda a, y: jode.solve(f, y, (0.0, t1), a, solver=solver).stats.accepted)(args, y0)))
    tableau, h = jode.tsit5.tableau, t1 / n

    def step(y, a):
        ks = []
        for row in tableau.a:
            ks.append(f(0.0, y + h * sum((w * k for w, k in zip(row, ks, strict=False) if w), jnp.zeros_like(y)), a))
        return y + h * sum(b * k for b, k in zip(tableau.b, ks, strict=True) if b)

    def one(args, y0):
        both = lambda c, _: (jax.jvp(step, (c[0], args), (c[1], along(args))), None)
        y, dot = jax.lax.scan(both, (y0, jnp.zeros_like(y0)), None, length=n)[0]
        return 2 * jnp.vdot(y, dot)

    return lambda args, y0: jnp.sum(mapped(one)(args, y0))


def mapped(solve):
    """The solve of one trajectory for y0 (n,), or of a batch for (rows, n)."""
    return lambda a, y: jax.vmap(solve, (None, 0))(a, y) if y.ndim > 1 else solve(a, y)


if __name__ == "__main__":
    main()
