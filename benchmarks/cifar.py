"""Step adaptation on CIFAR-10, as Ott et al. 2021 set it up: no layers before the ODE, one linear layer behind.

python -m benchmarks.cifar PATH          # scaled down: 8x8 pixels, 16 channels, 3,000 iterations
python -m benchmarks.cifar PATH --full   # theirs: 32x32, 128 channels, 7,800 iterations of 256; wants a GPU

PATH holds CIFAR-10, see `jode.data.cifar10`. On a JPEG copy accuracies are those of JPEG images.
"""

from benchmarks.measure import report, save

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jode
from jode import data
from jode.train import adapted
from jode.validity import StepAdaptation, first_step, swap

OPTIMIZER = optax.adam(1e-4)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("path")
    p.add_argument("--full", action="store_true")
    args = p.parse_args()
    size, width, batch, iterations = (32, 128, 256, 7800) if args.full else (8, 16, 128, 3000)
    optimizer = OPTIMIZER if args.full else optax.adam(1e-3)
    training, test = (shrunk(part, size) for part in data.cifar10(args.path))
    w = init(jax.random.key(0), size, width)
    adapt = StepAdaptation()
    rng = np.random.default_rng(0)
    h = first_step(field, training[0][:batch], w["field"])
    carry, steps, accuracies = (w, optimizer.init(w), adapt.init(h)), [], []
    step = jax.jit(adapted(adapt, logits, optimizer))
    for k in range(iterations):
        chosen = rng.integers(0, len(training[1]), batch)
        carry, (n, loss, right) = step(carry, (training[0][chosen], training[1][chosen]))
        steps.append(int(n))
        accuracies.append(float(right))
        if k % 250 == 249:
            print(
                f"{k + 1}: loss {loss:.3f}, accuracy {np.mean(accuracies[-250:]):.3f}, steps {np.mean(steps[-250:]):.1f}",
                flush=True,
            )
    w, n = carry[0], steps[-1]
    right = jax.jit(lambda w, x, y, solver: jnp.argmax(logits(w, x, solver), 1) == y)

    def metric(solver):
        parts = range(0, len(test[1]), 500)
        return np.concatenate([right(w, test[0][k : k + 500], test[1][k : k + 500], solver) for k in parts])

    table = swap(
        metric, [jode.Fixed(jode.euler, n), jode.Fixed(jode.euler, 4 * n), jode.Fixed(jode.midpoint, n), jode.Fixed(jode.rk4, n)]
    )
    print(f"\n{table}\n")
    scale = f"{size}x{size} pixels, {width} channels, {iterations:,} iterations of {batch}"
    found = [
        f"{100 * table.own[0]:.1f}",
        f"{2 * np.mean(steps):.1f}",
        f"{100 * table.drops[0]:.1f}",
        table.verdicts[0],
    ]
    rows = [
        [scale, "StepAdaptation, 1 seed", *found],
        ["32x32 pixels, 128 channels, 7,800 iterations of 256", "Ott et al. 2021, 5 seeds", "55.0 ± 0.8", "21.9", "–", "–"],
    ]
    columns = ["problem", "solver", "test accuracy %", "NFE forward and backward", "largest change %", "verdict at two points"]
    report("cifar" if args.full else "cifar_small", "CIFAR-10, Euler, float32", columns, rows)
    draw(steps, accuracies, "cifar" if args.full else "cifar_small")


def shrunk(images, size):
    """Means over blocks of pixels, channels last."""
    k = 32 // size
    x = images.images.reshape(-1, size, k, size, k, 3).mean((2, 4))
    return jnp.asarray(x, jnp.float32), jnp.asarray(images.labels)


def init(key, size, width):
    keys = jax.random.split(key, 4)
    draw = lambda key, fan_in, *shape: jax.random.normal(key, shape) * (2 / fan_in) ** 0.5
    return {
        "field": {
            "in": draw(keys[0], 3, 3, width),
            "mid": draw(keys[1], 9 * width, 9 * width, width),
            "out": draw(keys[2], width, width, 3),
            "bias": [jnp.zeros(width), jnp.zeros(width), jnp.zeros(3)],
        },
        "head": [draw(keys[3], 3 * size**2, 3 * size**2, 10), jnp.zeros(10)],
    }


def field(t, x, w):
    """Convolutions of sizes 1, 3, 1 with ReLU between; the middle one as a product of shifted copies."""
    h = jax.nn.relu(x @ w["in"] + w["bias"][0])
    height, width = h.shape[:2]
    padded = jnp.pad(h, ((1, 1), (1, 1), (0, 0)))
    shifts = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    h = jax.nn.relu(jnp.concatenate(shifts, axis=-1) @ w["mid"] + w["bias"][1])
    return h @ w["out"] + w["bias"][2]


def logits(w, x, solver):
    end = jax.vmap(partial(flow, w["field"], solver))(x)
    return end.reshape(len(x), -1) @ w["head"][0] + w["head"][1]


def flow(w, solver, x):
    return jode.odeint(field, x, (0.0, 1.0), w, solver=solver, adjoint=jode.Backprop(checkpoints=16))[-1]


def draw(steps, accuracies, name):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(np.arange(1, len(steps) + 1), steps, color="#c6553b")
    left.set(title="Euler steps chosen while training", xlabel="iteration", ylim=(0, None))
    window = np.convolve(accuracies, np.ones(100) / 100, "valid")
    right.plot(np.arange(100, len(accuracies) + 1), 100 * window, color="#2d6ca2")
    right.set(title="Training accuracy, %, mean of 100 batches", xlabel="iteration")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, name)
    plt.close(figure)


if __name__ == "__main__":
    main()
