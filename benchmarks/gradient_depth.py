"""How wrong is the gradient without stored states, by depth? Sander, Ablin & Peyré 2022, on trained convolutional nets and real digits.

Nets of N layers, each step 1/N, start with equal layers and are trained with exact gradients; then the memory-free gradient of
test digits is compared with the exact one, for each convolution of each layer. python -m benchmarks gradient_depth
"""

from benchmarks.measure import report, save

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jode
from jode import data, train
from jode.models import Classifier, layers, vector_field

DEPTHS = (4, 8, 16, 32, 64, 128)
WIDTH = 16
NETS = {"Euler": jode.Layers(jode.euler), "Heun, weights at nodes": jode.Layers(jode.heun, degree=1)}


def main(quick=False):
    training, test = data.digits()
    rows, curves = [], {}
    for name, solver in NETS.items():
        for depth in DEPTHS[1:4] if quick else DEPTHS:
            tied = partial(layers, depth=depth, turn=0.0)
            model = Classifier(training.images.shape[1:], WIDTH, block=tied, key=jax.random.key(0))
            model, done = train.fit(model, training, test, solver, name=f"{depth} layers", epochs=1 if quick else 10, rate=1e-2)
            cosines, error, drift = compare(model, solver, depth, test)
            curves.setdefault(name, []).append((depth, cosines.min(), np.median(cosines), error, drift))
            rows.append(
                [
                    depth,
                    name,
                    f"{100 * (1 - done.error):.2f}",
                    f"{cosines.min():.6f}",
                    f"{np.median(cosines):.6f}",
                    f"{error:.1e}",
                    f"{drift:.1e}",
                ]
            )
    for name, points in curves.items():
        for what, column in (("worst", 1), ("median", 2)):
            enough = [p[0] for p in points if p[column] > 0.99]
            rows.append(["fewest", f"{name}, {what} cosine > 0.99", *["–"] * 4, str(min(enough)) if enough else "none of these"])
    columns = [
        "depth",
        "solver",
        "test accuracy %",
        "worst cosine",
        "median cosine",
        "relative squared error",
        "reconstruction error",
    ]
    report("gradient_depth", "Memory-free gradients of trained convolutional nets, 8x8 digits, float32", columns, rows, quick)
    draw(curves, quick)


def compare(model, solver, depth, test, size=100):
    """Cosines between memory-free and exact gradients of each layer's convolutions, their mean squared error, and the drift."""
    images, labels = test.images[:size], test.labels[:size]

    def gradient(adjoint):
        return jax.jit(jax.grad(lambda model: train.objective(solver, adjoint)(model, images, labels)[0]))(model).block

    exact, free = gradient(jode.Backprop()), gradient(jode.MemoryFree(max_drift=np.inf))
    cosines, squares = [], []
    for layer in ("first", "second"):
        a, b = (np.asarray(getattr(g, layer).conv.weight, np.float64).reshape(depth, -1) for g in (exact, free))
        cosines.append((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
        squares.append(((a - b) ** 2).sum(1) / (a**2).sum(1))
    network = {"method": solver.method, "degree": solver.degree, "span": 1.0}
    drift = lambda x: jode.depth.reconstruction_error(vector_field, model.features(x), model.block, **network)
    return np.concatenate(cosines), np.mean(squares), float(jnp.mean(jax.jit(jax.vmap(drift))(images)))


def draw(curves, quick):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for (name, points), color in zip(curves.items(), ("#2d6ca2", "#c6553b"), strict=True):
        depth, worst, median, error, drift = np.array(points).T
        left.plot(depth, 1 - worst, "o-", color=color, label=f"{name}: worst layer")
        left.plot(depth, 1 - median, "o--", color=color, alpha=0.5, label=f"{name}: median")
        right.plot(depth, drift, "o-", color=color, label=f"{name}: reconstructed input")
        right.plot(depth, np.sqrt(error), "s--", color=color, alpha=0.5, label=f"{name}: gradient")
    left.axhline(0.01, color="#8a8f98", lw=1)
    left.annotate("cosine 0.99", (depth[0], 0.01), (-2, -12), textcoords="offset points", ha="left", color="#5a5f68")
    left.set(title="Angle to the exact gradient, by convolution", ylabel="1 - cosine")
    right.set(title="Relative error (root mean square)", ylabel="error")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log", xlabel="depth")
        ax.set_xticks(depth, [f"{d:.0f}" for d in depth])
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Backpropagation without stored states, on trained nets")
    save(figure, "gradient_depth", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
