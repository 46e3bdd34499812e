"""Gradient descent keeps a deep linear network smooth in depth: it learns an ODE, not a list (Sander, Ablin & Peyré 2022).

    python examples/linear_resnet.py       # ten seconds on two CPU cores

Fits the product of N matrices I + θ_n / N to a matrix B = I + noise, from θ = 0 and from independent θ, and saves one figure
(linear_resnet.png): the weights against depth, and N max ‖θ_{n+1} - θ_n‖ while they are learned.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jode
from jode import depth

DEPTHS, D, STEPS = (25, 100, 400), 2, 10_000
B = jnp.eye(D) + jax.random.normal(jax.random.key(8), (D, D))  # of positive determinant: a flow can reach it


def layer(t, x, a):
    return a @ x


def loss(w):
    """Mean square of what is missing; the network acts on the columns of the identity, so its output is the product."""
    return jnp.mean((jode.resnet(layer, jnp.eye(D), w, span=1.0) - B) ** 2)


@partial(jax.jit, static_argnums=1)
def descend(w, n):
    """Gradient descent with a rate proportional to N, as a layer's share of the gradient is 1/N: losses, smoothness, weights."""

    def step(w, _):
        value, g = jax.value_and_grad(loss)(w)
        return w - 0.02 * n * g, (value, depth.smoothness(w))

    def record(w, _):
        w_after, trace = jax.lax.scan(step, w, None, length=STEPS // 100)
        return w_after, (*trace, w)

    _, (losses, smoothness, weights) = jax.lax.scan(record, w, None, length=100)
    return losses.ravel(), smoothness.ravel(), weights


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", default="linear_resnet.png")
    args = p.parse_args()
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    fig, axes = plt.subplots(1, 4, figsize=(15, 4.2), layout="constrained")
    colors = dict(zip(DEPTHS, ("#9ec3de", "#4f8fbf", "#1d4f7c"), strict=True))
    print("| start | N | loss at the end | smoothness at the start | largest | at the end |\n|---|---:|---:|---:|---:|---:|")
    for ax, start, style in zip(axes, ("zero", "independent"), ("-", "--"), strict=False):
        for n in DEPTHS:
            w = jnp.zeros((n, D, D)) if start == "zero" else jax.random.normal(jax.random.key(n), (n, D, D))
            losses, smoothness, weights = descend(w, n)
            s = np.asarray(smoothness)
            print(f"| {start} | {n} | {losses[-1]:.1e} | {s[0]:.2f} | {s.max():.2f} | {s[-1]:.2f} |")
            line = {"color": colors[n], "ls": style, "lw": {25: 4.5, 100: 2.5, 400: 1}[n]}  # where curves coincide all show
            axes[2].plot(np.arange(1, STEPS + 1), losses, **line)
            axes[3].plot(np.arange(1, STEPS + 1), s, **line, label=f"N = {n}" if start == "zero" else None)
            if n == 100:
                for k, shade in ((99, "#c6553b"), (1, "#e0a458"), (0, "#22303c")):
                    lines = ax.plot(np.arange(n) / n, weights[k].reshape(n, -1), lw=1.2, color=shade)
                    lines[0].set_label(f"after {k * STEPS // 100:,} steps")
        ax.set(title=f"From {start} weights", xlabel="depth n / N (N = 100)", ylabel="entries of θ$_n$", ylim=(-4.5, 6))
    axes[0].legend(loc="upper right")
    axes[2].set(title="Loss", ylabel="mean square error", xscale="log", yscale="log")
    axes[3].set(title="Smoothness in depth", ylabel="N max ‖θ$_{n+1}$ - θ$_n$‖", xscale="log", yscale="log", ylim=(0.1, 1e4))
    axes[3].plot([], [], "--", color="#22303c", label="from independent weights")
    axes[3].legend(loc=(0.02, 0.29), fontsize=9)
    for ax in axes[2:]:
        ax.set(xlabel="step of gradient descent")
    fig.savefig(args.out, dpi=160)
    print(f"\nfigure: {args.out}")


if __name__ == "__main__":
    main()
