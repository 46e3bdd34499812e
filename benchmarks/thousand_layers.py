"""A residual network of 1,000 layers without stored states: is it trained as well, in the memory of ten layers?

Perceptron blocks on scikit-learn's digits, each step 1/N. python -m benchmarks thousand_layers
"""

from benchmarks.measure import report, save

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jode
import jode.depth
from jode import data, train

WIDTH, BATCH, DEEP, SEEDS = 32, 128, 1000, 3
ADJOINTS = {"MemoryFree": jode.MemoryFree(), "Backprop": jode.Backprop(None)}
MEMORY = (10, 30, 100, 300, 1000, 3000)


def main(quick=False):
    rows, curves = [], {}
    training, test = data.digits()
    for name, adjoint in ADJOINTS.items():
        for depth in MEMORY:
            mib = memory(adjoint, depth)
            curves.setdefault(name, []).append(mib)
            rows.append([depth, name, f"{mib:.2f}", "–", "–"])
    flat = curves["MemoryFree"]
    rows.append(["1000 / 10", "MemoryFree", f"{flat[MEMORY.index(1000)] / flat[0]:.3f}", "–", "–"])
    found = {}
    for name, adjoint in ADJOINTS.items():
        seeds = range(1 if quick else SEEDS)
        found[name] = [fit(adjoint, training, test, seed, epochs=2 if quick else 20) for seed in seeds]
        accuracy, seconds = np.mean([f[0] for f in found[name]]), np.median([f[1] for f in found[name]])
        rows.append([DEEP, f"{name}, trained, mean of {len(found[name])} seeds", "–", f"{accuracy:.2f}", f"{seconds:.2f}"])
    report(
        "thousand_layers",
        f"Residual perceptrons of width {WIDTH}, batch {BATCH}, 8x8 digits, float32",
        ["depth", "solver", "temporaries of the gradient, MiB", "test accuracy %", "s a step"],
        rows,
        quick,
    )
    draw(curves, {name: f[0][2] for name, f in found.items()}, quick)


def block(t, x, w):
    return jnp.tanh(x @ w["in"] + w["bias"]) @ w["out"]


def init(key, depth):
    def one(key):
        a, b = jax.random.split(key)
        scale = 1 / np.sqrt(WIDTH)
        return {
            "in": scale * jax.random.normal(a, (WIDTH, WIDTH)),
            "bias": jnp.zeros(WIDTH),
            "out": scale * jax.random.normal(b, (WIDTH, WIDTH)),
        }

    a, b, c = jax.random.split(key, 3)
    return {
        "stem": jax.random.normal(a, (64, WIDTH)) / 8,
        "layers": jode.depth.smooth_init(b, one, depth),
        "head": jax.random.normal(c, (WIDTH, 10)) / np.sqrt(WIDTH),
    }


def logits(adjoint, w, image):
    x = image.reshape(-1) @ w["stem"]
    return jode.resnet(block, x, w["layers"], span=1.0, adjoint=adjoint) @ w["head"]


def loss(adjoint, w, images, labels):
    scores = jax.vmap(logits, (None, None, 0))(adjoint, w, images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels))


def memory(adjoint, depth):
    """MiB of temporaries of the gradient of one batch; weights and their gradients are not counted."""
    w = jax.eval_shape(lambda key: init(key, depth), jax.random.key(0))
    images = jax.ShapeDtypeStruct((BATCH, 8, 8, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    program = jax.jit(jax.grad(lambda *x: loss(adjoint, *x))).lower(w, images, labels).compile()
    return program.memory_analysis().temp_size_in_bytes / 2**20


def fit(adjoint, training, test, seed, epochs):
    """Test accuracy in percent, seconds a step, and the losses on the way."""
    import time

    w = init(jax.random.key(seed), DEEP)
    steps = epochs * (len(training.labels) // BATCH)
    # A layer's gradient is 1/N of that of the ODE's weights there: Adam does not mind, and steps are those of the ODE.
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    state = optimizer.init(w)

    @jax.jit
    def step(w, state, images, labels):
        value, g = jax.value_and_grad(lambda w: loss(adjoint, w, images, labels))(w)
        updates, state = optimizer.update(g, state)
        return optax.apply_updates(w, updates), state, value

    losses, times = [], []
    for images, labels in train.batches(training, BATCH, epochs, seed):
        start = time.perf_counter()
        w, state, value = step(w, state, images, labels)
        losses.append(float(value))
        times.append(time.perf_counter() - start)
    scores = jax.jit(jax.vmap(lambda image: logits(adjoint, w, image)))(test.images)
    return 100 * float(np.mean(np.argmax(scores, -1) == test.labels)), float(np.median(times)), losses


def draw(curves, losses, quick):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, color, style in (("Backprop", "#2d6ca2", "-"), ("MemoryFree", "#c6553b", "--")):
        left.plot(MEMORY, curves[name], "o-", color=color, label=name)
        left.annotate(
            f"{curves[name][-1]:.1f} MiB", (MEMORY[-1], curves[name][-1]), (6, -3), textcoords="offset points", color=color
        )
        right.plot(np.arange(1, len(losses[name]) + 1), losses[name], style, color=color, label=name, lw=1.6)
    left.set(xscale="log", yscale="log", xlabel="depth", title="Temporaries of the gradient, MiB", xlim=(8, 9000))
    left.set_xticks(MEMORY, [f"{d:,}" for d in MEMORY])
    left.minorticks_off()
    right.set(yscale="log", xlabel="training step", title=f"Training loss of {DEEP:,} layers")
    for ax in (left, right):
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, "thousand_layers", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
