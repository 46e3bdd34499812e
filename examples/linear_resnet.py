"""Gradient descent keeps a deep linear network smooth in depth: it learns an ODE, not a list (Sander, Ablin & Peyré 2022).

    python examples/linear_resnet.py       # seconds

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
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(1, 4, figsize=(15, 3.8), constrained_layout=True)
    colors = dict(zip(DEPTHS, ("#9ec3de", "#4f8fbf", "#1d4f7c"), strict=True))
    print("| start | N | loss at the end | smoothness at the start | largest | at the end |\n|---|---:|---:|---:|---:|---:|")
    for column, start in enumerate(("zero", "independent")):
        for n in DEPTHS:
            w = jnp.zeros((n, D, D)) if start == "zero" else jax.random.normal(jax.random.key(n), (n, D, D))
            losses, smoothness, weights = descend(w, n)
            s = np.asarray(smoothness)
            print(f"| {start} | {n} | {losses[-1]:.1e} | {s[0]:.2f} | {s.max():.2f} | {s[-1]:.2f} |")
            axes[2].loglog(np.arange(1, STEPS + 1), losses, "-" if start == "zero" else "--", color=colors[n])
            label = f"N = {n}" if start == "zero" else None
            axes[3].loglog(np.arange(1, STEPS + 1), s, "-" if start == "zero" else "--", color=colors[n], label=label)
        n = 100
        _, _, weights = descend(jnp.zeros((n, D, D)) if start == "zero" else jax.random.normal(jax.random.key(n), (n, D, D)), n)
        for k in (0, 1, 10, 99) if column == 0 else (0, 99):
            shade = plt.get_cmap("viridis")(np.log1p(k) / np.log(110))
            label = f"after {k * STEPS // 100:,} steps" if column == 0 else None
            axes[column].plot(np.arange(n) / n, weights[k].reshape(n, -1), ".-", ms=2, lw=0.8, color=shade)
            axes[column].plot([], [], color=shade, label=label)
        axes[column].set(title=f"Entries of θ, from {start} weights", xlabel="depth n / N (N = 100)")
    axes[0].legend(frameon=False, fontsize=7)
    axes[2].set(title="Loss (dashed: from independent weights)", xlabel="step of gradient descent", ylim=(1e-9, None))
    axes[3].set(title="Smoothness, N max ‖θ$_{n+1}$ - θ$_n$‖", xlabel="step of gradient descent", ylim=(0.1, None))
    axes[3].legend(frameon=False)
    fig.savefig(args.out, dpi=160)
    print(f"\nfigure: {args.out}")


if __name__ == "__main__":
    main()
