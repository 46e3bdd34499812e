"""Does training keep a residual network an ODE? Smoothness in depth, N max ‖θ_{n+1} - θ_n‖, while networks learn real digits.

From equal layers or independent ones, with tanh or ReLU, by gradient descent with rates proportional to N (Marion et al. 2024).
python -m benchmarks regularisation
"""

from benchmarks.measure import report, save

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jode
import jode.depth
from jode import data

WIDTH, BATCH, STEPS, RATE = 32, 256, 1000, 0.05
DEPTHS = (16, 64, 256)
STARTS = {
    "equal, tanh": (True, jnp.tanh, "#2d6ca2"),
    "equal, ReLU": (True, jax.nn.relu, "#5b8c5a"),
    "independent, tanh": (False, jnp.tanh, "#c6553b"),
}


def main(quick=False):
    training, test = data.digits()
    rows, curves, steps = [], {}, STEPS // 10 if quick else STEPS
    for name, (smooth, activation, _) in STARTS.items():
        for depth in DEPTHS:
            w, smoothness, losses = train(
                depth, smooth, activation, jnp.asarray(training.images), jnp.asarray(training.labels), steps
            )
            inputs = jnp.asarray(test.images[:20]).reshape(20, -1) @ w["stem"]
            block = partial(layer, activation)
            distance = jax.jit(jax.vmap(lambda x: jode.depth.distance(block, x, w["layers"], span=1.0, substeps=2)))(inputs)
            right = jnp.argmax(jax.vmap(partial(logits, activation, w))(jnp.asarray(test.images)), -1) == test.labels
            curves[name, depth] = np.asarray(smoothness)
            s = curves[name, depth]
            found = [f"{s[0]:.2f}", f"{s.max():.2f}", f"{s[-1]:.2f}", f"{losses[-1]:.3f}", f"{100 * jnp.mean(right):.1f}"]
            rows.append([depth, name, *found, f"{jnp.mean(distance):.1e}"])
    columns = [
        "depth",
        "solver",
        "N max ‖Δθ‖ at first",
        "largest",
        "at the end",
        "loss",
        "test accuracy %",
        "distance from its ODE",
    ]
    report(
        "regularisation",
        f"Residual perceptrons of width {WIDTH}, 8x8 digits, {steps} steps of gradient descent",
        columns,
        rows,
        quick,
    )
    draw(curves, quick)


def layer(activation, t, x, w):
    return activation(x @ w["in"] + w["bias"]) @ w["out"]


def logits(activation, w, image):
    return jode.resnet(partial(layer, activation), image.reshape(-1) @ w["stem"], w["layers"], span=1.0) @ w["head"]


@partial(jax.jit, static_argnums=(0, 1, 2, 5))
def train(depth, smooth, activation, images, labels, steps):
    def one(key):
        a, b = jax.random.split(key)
        draw = lambda key: jax.random.normal(key, (WIDTH, WIDTH)) / np.sqrt(WIDTH)
        return {"in": draw(a), "bias": jnp.zeros(WIDTH), "out": draw(b)}

    a, b, c, d = jax.random.split(jax.random.key(0), 4)
    layers = jode.depth.smooth_init(b, one, depth, turn=0.0) if smooth else jax.vmap(one)(jax.random.split(b, depth))
    w = {
        "stem": jax.random.normal(a, (64, WIDTH)) / 8,
        "layers": layers,
        "head": jax.random.normal(c, (WIDTH, 10)) / np.sqrt(WIDTH),
    }

    def loss(w, batch):
        scores = jax.vmap(partial(logits, activation, w))(images[batch])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels[batch]))

    def step(w, key):
        value, g = jax.value_and_grad(loss)(w, jax.random.randint(key, (BATCH,), 0, len(labels)))
        rates = {"stem": RATE / 3, "layers": RATE * depth, "head": RATE / 3}  # a layer's share of the gradient is 1 / N
        w = {k: jax.tree.map(lambda w, g, k=k: w - rates[k] * g, w[k], g[k]) for k in w}
        return w, (jode.depth.smoothness(w["layers"]), value)

    w, (smoothness, losses) = jax.lax.scan(step, w, jax.random.split(d, steps))
    return w, smoothness, losses


def draw(curves, quick):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(STARTS), figsize=(13, 4), layout="constrained")
    for ax, (name, (*_, color)) in zip(axes, STARTS.items(), strict=True):
        for depth, alpha in zip(DEPTHS, (0.35, 0.65, 1.0), strict=True):
            s = curves[name, depth]
            ax.plot(np.arange(1, len(s) + 1), s, color=color, alpha=alpha, label=f"N = {depth}")
        ax.set(title=name, xlabel="step of gradient descent", xscale="log", yscale="log", ylim=(1, None))
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    axes[0].set(ylabel="N max ‖θ$_{n+1}$ - θ$_n$‖")
    top = max(s.max() for s in curves.values()) * 2
    for ax in axes:
        ax.set_ylim(1, top)
    figure.suptitle("Smoothness in depth while training on digits")
    save(figure, "regularisation", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
