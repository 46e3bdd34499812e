"""Gradients of 1,000 steps: is a reversible method without stored states faster than the best checkpointing, at no more memory?

python -m benchmarks.reversible
"""

from benchmarks.measure import compiled, race, report, save  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jode

STEPS = 1000


def main(quick=False):
    rows, best = [], {}
    for name, (f, y0, w) in list(problems().items())[: 1 if quick else None]:
        programs, costs = {}, {}
        for peer, solve in contestants(f).items():
            loss = lambda y0, w, solve=solve: jnp.sum(solve(y0, w) ** 2)
            programs[peer], costs[peer] = compiled(jax.grad(loss, (0, 1)), y0, w, quick=quick)
        exact = ravel(programs["jode, midpoint, Backprop()"](y0, w))
        times = race(programs, y0, w, repeats=5, seconds=0.3 if quick else 1.0)
        fair = min(v for k, v in times.items() if "checkpoints" in k or k.endswith("default"))
        for peer, seconds in times.items():
            error = np.linalg.norm(ravel(programs[peer](y0, w)) - exact) / np.linalg.norm(exact)
            memory = programs[peer].memory_analysis().temp_size_in_bytes / 2**20
            rows.append(
                [name, peer, f"{seconds * 1e3:.2f}", f"{fair / seconds:.2f}", f"{memory:.3f}", f"{error:.1e}", f"{costs[peer]:.2f}"]
            )
            best[name, peer] = (memory, seconds * 1e3)
    columns = [
        "problem",
        "solver",
        "ms",
        "times as fast as diffrax's best checkpointing",
        "temporaries MiB",
        "difference from Backprop on midpoint",
    ]
    report("reversible", f"Gradient of {STEPS} steps, float32", [*columns, "trace + compile s"], rows, quick)
    draw(best, quick)


def problems():
    """name: (f, y0, weights)."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    def perceptron(t, y, w):
        return jnp.tanh(y @ w[0]) @ w[1]

    return {
        "MLP 10-10-10": (perceptron, normal(10), (normal(10, 10), normal(10, 10))),
        "MLP 64-128-64, batch 128": (perceptron, normal(128, 64), (normal(64, 128), normal(128, 64))),
    }


def contestants(f):
    """Functions (y0, weights) -> y(1)."""
    h = 1 / STEPS

    def ours(method, adjoint):
        return lambda y0, w: jode.odeint(f, y0, (0.0, 1.0), w, solver=jode.Fixed(method, STEPS), adjoint=adjoint)[-1]

    def theirs(solver, adjoint):
        def solve(y0, w):
            grid = diffrax.StepTo(ts=jnp.linspace(0, 1, STEPS + 1))
            return diffrax.diffeqsolve(
                diffrax.ODETerm(f),
                solver,
                0.0,
                1.0,
                None,
                y0,
                w,
                stepsize_controller=grid,
                adjoint=adjoint,
                throw=False,
                max_steps=STEPS,
            ).ys[-1]

        return solve

    def default(y0, w, **options):
        return diffrax.diffeqsolve(diffrax.ODETerm(f), diffrax.Midpoint(), 0.0, 1.0, h, y0, w, **options).ys[-1]

    table = {
        "jode, midpoint, Backprop()": ours(jode.midpoint, jode.Backprop()),
        "jode, midpoint, Backprop(45)": ours(jode.midpoint, jode.Backprop(45)),
        "jode, Reversible(midpoint), MemoryFree": ours(jode.Reversible(jode.midpoint), jode.MemoryFree()),
        "jode, reversible_heun, MemoryFree": ours(jode.reversible_heun, jode.MemoryFree()),
        "jode, leapfrog, MemoryFree": ours(jode.leapfrog, jode.MemoryFree()),
        "jode, midpoint, MemoryFree (approximate)": ours(jode.midpoint, jode.MemoryFree()),
        "jode, midpoint, Backsolve": ours(jode.midpoint, jode.Backsolve()),
        "diffrax, midpoint, default": default,
    }
    for k in (16, 45, 200, STEPS):
        table[f"diffrax, midpoint, checkpoints = {k}"] = theirs(
            diffrax.Midpoint(), diffrax.RecursiveCheckpointAdjoint(checkpoints=k)
        )
    table["diffrax, midpoint, BacksolveAdjoint"] = lambda y0, w: default(y0, w, adjoint=diffrax.BacksolveAdjoint())
    return table


def ravel(tree):
    return np.concatenate([np.ravel(np.asarray(x, float)) for x in jax.tree.leaves(tree)])


def draw(best, quick):
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for name, _ in best))
    figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 4.6), layout="constrained", squeeze=False)
    for ax, name in zip(axes.flat, names, strict=True):
        for (problem, peer), (memory, ms) in best.items():
            if problem == name:
                ours = peer.startswith("jode")
                ax.plot(memory, ms, "o" if ours else "s", color="#c6553b" if ours else "#2d6ca2", ms=7)
                ax.annotate(
                    peer.split(", ", 1)[1],
                    (memory, ms),
                    (7, -9 if "leapfrog" in peer or "default" in peer else 2),
                    textcoords="offset points",
                    fontsize=7,
                )
        ax.set(xscale="log", yscale="log", xlabel="temporaries, MiB", ylabel="ms a gradient", title=name)
        ax.minorticks_off()
        ax.set_xticks([x for x in (0.001, 0.01, 0.1, 1, 10) if ax.get_xlim()[0] < x < ax.get_xlim()[1]])
        ax.set_yticks([y for y in (1, 3, 10, 30, 100, 300, 1000) if ax.get_ylim()[0] < y < ax.get_ylim()[1]])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Gradients of {STEPS} steps: jode (red), diffrax (blue)")
    save(figure, "reversible", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
