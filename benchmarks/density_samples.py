"""Samples of a flow with their log-likelihoods: what does one row a sample cost, each with steps of its own?

10,000 samples of a trained field, N -> 8 gaussians by OT flow matching, and log p by the exact trace; three hidden layers of 64 with
tanh, and with SELU, whose derivative jumps: so does the trace, and adaptive solvers search for the places. Peers: diffrax under
`jax.vmap`, tuned (first step given, no throw, steps bounded) and with the same method and tolerance; and the whole batch as one state,
whose steps all rows share, with the loosest tolerance of a grid at which its error in log p is no more than a tenth above that of one
row a sample. Errors are root mean squares over rows against a tight solve.

python -m benchmarks density_samples
"""

from benchmarks.measure import compiled, race, report  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jode
from benchmarks.flow_matching import DRAWS, POINTS, TASKS, train
from jode.models.density import CNF, Exact, Normal, sample, squared_w2

TOL, GRID = 1e-5, 10.0 ** np.arange(0.75, -1.6, -0.25)  # the grid is relative to TOL
FIELDS = {"SELU": jax.nn.selu, "tanh": jnp.tanh}


def main(quick=False):
    n, rows = 1000 if quick else 10_000, []
    source, target = TASKS[0]
    keys = jax.random.split(jax.random.key(1), n)
    data = DRAWS[target](jax.random.key(2), min(n, POINTS))
    for name, activation in FIELDS.items() if not quick else [("tanh", jnp.tanh)]:
        flow = CNF(train("OT-CFM", source, target, 0, 500 if quick else 5_000, activation), Normal(2))
        exact, found = own(flow, jode.dopri8)(1e-6, keys), own(flow, jode.tsit5)(TOL, keys)
        goal = 1.1 * error(found[1], exact[1])
        print(f"{name}: {float(found[2].mean()):.1f} steps a row in the mean, {int(found[2].max())} at most", flush=True)
        programs, costs, tolerances, measured = {}, {}, {}, {}
        for who, solve in contestants(flow).items():
            tolerances[who] = loosest(solve, keys, exact[1], goal) if who.endswith("one state") else TOL
            most = int(1.2 * int(jnp.max(jax.jit(solve)(tolerances[who], keys)[2]))) + 8
            run, costs[who] = compiled(contestants(flow, most)[who], tolerances[who], keys, quick=quick)
            programs[who] = lambda keys, run=run, tol=tolerances[who]: run(tol, keys)
            x, log_prob, steps = programs[who](keys)
            w2 = squared_w2(x[: len(data)], data)
            errors = f"{error(log_prob, exact[1]):.1e}", f"{error(x, exact[0]):.1e}", f"{w2:.3f}"
            measured[who] = [f"{float(jnp.mean(steps)):.1f}", *errors]
        times = race(programs, keys, repeats=5, seconds=0.3 if quick else 5.0)
        for who, seconds in times.items():
            ratio = f"{seconds / times['jode, one row a sample']:.2f}"
            rows.append([name, who, f"{tolerances[who]:.1e}", f"{seconds * 1e3:.0f}", ratio, *measured[who], f"{costs[who]:.2f}"])
    columns = ["field", "solver", "tolerance", "ms", "time / jode", "steps a row", "error of log p", "error of x"]
    columns += ["squared W₂ to data", "trace + compile s"]
    report("density_samples", f"{n:,} samples with log-likelihoods, Tsit5, float32", columns, rows, quick)


def error(found, exact):
    return float(jnp.sqrt(jnp.mean((found - exact) ** 2)))


def loosest(solve, keys, exact, goal):
    """The largest tolerance of the grid whose error in log p is at most the goal."""
    run = jax.jit(solve)
    for factor in GRID:
        if error(run(TOL * factor, keys)[1], exact) <= goal:
            return TOL * factor
    return TOL * GRID[-1]


def own(flow, method):
    """(tolerance, keys) -> samples, their log p, steps of each row."""

    def one(tol, key):
        found = sample(flow, key, trace=Exact(), solver=jode.Adaptive(method, tol, tol))
        return found.x, found.log_prob, found.nfe / method.trials

    return jax.jit(jax.vmap(one, (None, 0)))


def contestants(flow, most=512):
    """Functions (tolerance, keys) -> samples, their log p, steps; `most` bounds the steps of diffrax."""
    draws = jax.vmap(lambda key: flow.base.sample(jax.random.split(key)[0]))  # as `sample` draws

    def joint(t, state, args):
        """dx/dt and minus its divergence, from one evaluation and two Jacobian-vector products."""
        dx, product = jax.linearize(lambda x: flow.field(t, x), state[0])
        return dx, -sum(product(e)[i] for i, e in enumerate(jnp.eye(2, dtype=dx.dtype)))  # one by one is the fastest

    together = jax.vmap(joint, (None, 0, None))

    def diffrax_solve(f, tol, z, log):
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(f),
            diffrax.Tsit5(),
            0.0,
            1.0,
            y0=(z, jnp.zeros(z.shape[:-1])),
            dt0=0.02,
            stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
            throw=False,
            max_steps=most,
        )
        return found.ys[0][-1], log + found.ys[1][-1], found.stats["num_steps"]

    def jode_together(tol, keys):
        z = draws(keys)
        found = jode.solve(together, (z, jnp.zeros(len(z))), (0.0, 1.0), solver=jode.Adaptive(jode.tsit5, tol, tol))
        return found.ys[0][-1], jax.vmap(flow.base.log_prob)(z) + found.ys[1][-1], found.stats.steps

    def diffrax_together(tol, keys):
        z = draws(keys)
        return diffrax_solve(together, tol, z, jax.vmap(flow.base.log_prob)(z))

    def diffrax_rows(tol, keys):
        return jax.vmap(lambda z: diffrax_solve(joint, tol, z, flow.base.log_prob(z)))(draws(keys))

    return {
        "jode, one row a sample": own(flow, jode.tsit5),
        "diffrax, one row a sample": diffrax_rows,
        "jode, one state": jode_together,
        "diffrax, one state": diffrax_together,
    }


if __name__ == "__main__":
    main()
