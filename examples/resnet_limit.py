"""Does a residual network become an ODE as it gets deeper? Only if its weights are smooth in depth (Sander, Ablin & Peyré 2022).

    python examples/resnet_limit.py        # a minute on two CPU cores

Prints the distance between networks of 16 to 512 layers and the ODE through their weights, with its bound C (e^L - 1) / (2 N L),
and saves one figure (resnet_limit.png).
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jode
from jode import depth

DEPTHS, SEEDS, D = (16, 32, 64, 128, 256, 512), 8, 4
KINDS = {"smooth weights": (0.0, "#2d6ca2"), "smooth weights and noise": (2.0, "#c6553b")}
X = jnp.linspace(-1.0, 1.0, D)


def block(t, x, w):
    return jnp.tanh(w["a"] @ x + w["b"])


def init(key):
    a, b = jax.random.split(key)
    return {"a": jax.random.normal(a, (D, D)) / np.sqrt(D), "b": jax.random.normal(b, (D,)) / 2}


def network(seed, n, noise):
    """Weights that turn slowly with depth, and, if there is noise, jitter independently from layer to layer."""
    smooth, jitter = jax.random.split(jax.random.key(seed))
    w = depth.smooth_init(smooth, init, n)
    return {**w, "a": w["a"] + noise * jax.random.normal(jitter, w["a"].shape) / np.sqrt(D)}


def measure(n, noise):
    """Geometric means over networks of the distance and its bound, and whether the bound held for each."""

    @jax.jit
    @jax.vmap
    def one(seed):
        w = network(seed, n, noise)
        return depth.distance(block, X, w, span=1.0), depth.distance_bound(block, X, w, span=1.0).value

    d, bound = one(jnp.arange(SEEDS))
    return float(jnp.exp(jnp.mean(jnp.log(d)))), float(jnp.exp(jnp.mean(jnp.log(bound)))), bool(jnp.all(d <= bound))


def paths(n, noise):
    """The second component of a network's layers, and of its ODE."""
    w, fine = network(0, n, noise), jnp.linspace(0, 1, 401)
    layers = jode.odeint(block, X, jnp.linspace(0, 1, n + 1), w, solver=jode.Layers(jode.euler))
    return layers[:, 1], fine, jode.odeint(depth.field(block, span=1.0), X, fine, w, solver=jode.Fixed(jode.rk4, 4))[:, 1]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", default="resnet_limit.png")
    args = p.parse_args()
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    fig, (a, b, c) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained", width_ratios=(1.2, 1, 1))
    c.sharey(b)
    print("|  | N | distance | bound | holds |\n|---|---:|---:|---:|---|")
    for (name, (noise, color)), ax in zip(KINDS.items(), (b, c), strict=True):
        rows = [measure(n, noise) for n in DEPTHS]
        for n, (d, bound, holds) in zip(DEPTHS, rows, strict=True):
            print(f"| {name} | {n} | {d:.2e} | {bound:.2e} | {holds} |")
        slope = np.polyfit(np.log(DEPTHS), np.log([r[0] for r in rows]), 1)[0]
        print(f"| {name} | slope | {slope:.2f} | | |")
        a.plot(DEPTHS, [r[0] for r in rows], "o-", color=color, label=f"{name}: slope {slope:.2f}")
        a.plot(DEPTHS, [r[1] for r in rows], "--", color=color, alpha=0.6, label="its bound")
        for n, alpha, size, width in ((16, 0.45, 6, 4), (256, 1.0, 2, 1.5)):
            layers, fine, curve = paths(n, noise)
            ax.plot(fine, curve, color=color, lw=width, alpha=alpha, label=f"ODE of {n} layers")
            ax.plot(np.linspace(0, 1, n + 1), layers, "o", color="#22303c", ms=size, alpha=alpha, mew=0, label=f"{n} layers")
        ax.set(title=name.capitalize(), xlabel="depth t", ylabel="second component of x", ylim=(-0.35, 0.1))
        ax.legend(loc="upper left", ncols=2, columnspacing=1, handletextpad=0.5, fontsize=9)
    a.set(title="Distance of the network from its ODE", xlabel="layers N", ylabel="max$_n$ ‖x$_n$ - x(t$_n$)‖")
    a.set(xscale="log", yscale="log")
    a.set_xticks(DEPTHS, map(str, DEPTHS))
    a.minorticks_off()
    a.legend(loc=(0.02, 0.5))
    fig.savefig(args.out, dpi=160)
    print(f"\nfigure: {args.out}")


if __name__ == "__main__":
    main()
