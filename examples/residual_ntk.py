"""The empirical neural tangent kernel of a residual network, against width and depth.

    python examples/residual_ntk.py        # a minute on two CPU cores

K(x, x') = <∂f(x)/∂θ, ∂f(x')/∂θ> of x ← x + L^-s W2 tanh(W1 x) / √width over L independent layers. It fluctuates from draw to
draw less and less as the width grows, whatever the depth. Its size stays bounded in depth for steps of 1/√L (s = 1/2), and explodes
for s = 0; with s = 1, the scaling of the ODE, independent layers average out, and what is left is that of embedding and reader.
Saves residual_ntk.png.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jode

D, DRAWS = 8, 24
POINTS = jnp.stack([jnp.array([jnp.cos(a), jnp.sin(a)]) for a in np.linspace(0, np.pi, D)])


def block(t, x, w):
    return w["out"] @ jnp.tanh(w["in"] @ x) / np.sqrt(x.shape[0])


def init(key, depth, width):
    a, b, c, d = jax.random.split(key, 4)
    layers = {
        "in": jax.random.normal(a, (depth, width, width)) / np.sqrt(width),
        "out": jax.random.normal(b, (depth, width, width)),
    }
    return {"embed": jax.random.normal(c, (width, 2)), "layers": layers, "read": jax.random.normal(d, (width,)) / np.sqrt(width)}


def network(w, x, power):
    depth = w["layers"]["in"].shape[0]
    x = jode.resnet(block, w["embed"] @ x, w["layers"], span=depth ** (1.0 - power))  # steps of L^-power
    return w["read"] @ x


@partial(jax.jit, static_argnums=(1, 2, 3))
def kernel(key, depth, width, power):
    """K at all pairs of points: the Jacobian times its transpose, summed over the leaves."""
    w = init(key, depth, width)
    rows = jax.vmap(jax.grad(network), (None, 0, None))(w, POINTS, power)
    return sum(x.reshape(D, -1) @ x.reshape(D, -1).T for x in jax.tree.leaves(rows)) / width


def kernels(depth, width, power):
    return np.stack([kernel(jax.random.key(k), depth, width, power) for k in range(DRAWS)])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", default="residual_ntk.png")
    args = p.parse_args()
    widths, depths = (16, 32, 64, 128), (2, 4, 8, 16, 32)
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    fig, (a, b, c) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    print(
        "fluctuation of K from draw to draw, relative, steps 1/√L\n\n| L \\ width | " + " | ".join(map(str, widths)) + " | slope |"
    )
    print("|" + "---|" * (len(widths) + 2))
    for depth, color in zip(depths[::2], ("#9ec3de", "#4f8fbf", "#1d4f7c"), strict=True):
        spread = []
        for width in widths:
            K = kernels(depth, width, 0.5)
            spread.append(np.linalg.norm(K.std(0)) / np.linalg.norm(K.mean(0)))
        slope = np.polyfit(np.log(widths), np.log(spread), 1)[0]
        print(f"| {depth} | " + " | ".join(f"{s:.3f}" for s in spread) + f" | {slope:.2f} |")
        a.loglog(widths, spread, "o-", color=color, label=f"{depth} layers, slope {slope:.2f}")
    a.set_xticks(widths, map(str, widths))
    a.set_yticks([0.2, 0.3, 0.4], ["0.2", "0.3", "0.4"])
    a.set(title="From draw to draw, steps of 1/√L", xlabel="width", ylabel="standard deviation of K / mean of K")
    for power, step, color in ((0.0, "1", "#c6553b"), (0.5, "1/√L", "#2d6ca2"), (1.0, "1/L", "#5b8c5a")):
        sizes = [np.trace(kernels(depth, 64, power).mean(0)) / D for depth in depths]
        b.loglog(depths, sizes, "o-", color=color, label=f"steps of {step}")
        print(f"size of K, steps of {step}: " + ", ".join(f"{s:.2f} (L = {d})" for d, s in zip(depths, sizes, strict=True)))
    b.set_xticks(depths, map(str, depths))
    b.set(title="Size, width 64", xlabel="layers L", ylabel="mean of K(x, x)")
    for k, depth in enumerate(depths):
        K = kernels(depth, 64, 0.5).mean(0)
        style = {"lw": 9 - 2 * k, "color": plt.get_cmap("Blues")(0.3 + 0.17 * k)}  # the curves coincide
        c.plot(np.linspace(0, 180, D), K[0] / K[0, 0], **style, label=f"{depth} layers")
    c.set(title="Shape, steps of 1/√L, width 64", xlabel="angle between x and x', degrees", ylabel="K(x, x') / K(x, x)")
    c.set_xticks([0, 45, 90, 135, 180])
    for ax in (a, b, c):
        ax.minorticks_off()
        ax.legend()
    fig.savefig(args.out, dpi=160)
    print(f"\nfigure: {args.out}")


if __name__ == "__main__":
    main()
