"""Weights as a function of depth, found by nonlinear conjugate gradients with a Sobolev gradient (Baravdish et al. 2022).

    python examples/depth_cg.py            # half a minute on two CPU cores

Trains dx/dt = W2(t) tanh(W1(t) x + b(t)) to separate two moons, by gradient descent and by conjugate gradients whose step comes
from one sensitivity solve and whose gradient G solves (1 - μ d²/dt²) G = J'. At equal loss the second θ(t) is smoother. Saves
depth_cg.png.
"""

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import make_moons

import jode
from jode import depth

N, D, HIDDEN, MU, RATE, STEPS = 64, 3, 12, 0.05, 0.3, 60
POINTS, LABELS = make_moons(200, noise=0.08, random_state=0)
X, Y = jnp.asarray(np.c_[POINTS, np.zeros(len(POINTS))], jnp.float32), jnp.asarray(2.0 * LABELS - 1, jnp.float32)


def field(t, x, w):
    return w["out"] @ jnp.tanh(w["in"] @ x + w["bias"])


def outputs(w, adjoint=jode.Backprop()):
    """The last component at depth 1; weights are nodes of Heun's method, a line between each two."""
    return jax.vmap(lambda x: jode.resnet(field, x, w, method=jode.heun, degree=1, span=1.0, adjoint=adjoint)[-1])(X)


def inner(a, b):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def init(key):
    a, b, c = jax.random.split(key, 3)
    draw = lambda key, *shape: jax.random.normal(key, shape) / np.sqrt(D)
    return {"in": draw(a, HIDDEN, D), "out": draw(b, D, HIDDEN), "bias": draw(c, HIDDEN)}


def along(w, d, beta):
    return jax.tree.map(lambda w, d: w + beta * d, w, d)


def slope(w):
    """The loss and J', the gradient in the inner product ∫ a b dt of functions of depth."""
    value, g = jax.value_and_grad(lambda w: jnp.mean((outputs(w) - Y) ** 2) / 2)(w)
    return value, jax.tree.map(lambda g: N * g, g)


def descend(w, _):
    value, g = slope(w)
    return along(w, g, -RATE), (value, depth.roughness(w), w)


def conjugate(carry, _):
    w, d, before, steepest = carry
    value, g = slope(w)
    G = depth.sobolev(g, MU)
    gamma = jnp.maximum(inner(jax.tree.map(jnp.subtract, g, before), G) / inner(before, steepest), 0.0)  # Polak & Ribière
    d = jax.tree.map(lambda G, d: gamma * d - G, G, d)
    # The linearised problem δẋ = f_x δx + f_θ d gives the curvature along d, and that the length of the step.
    _, sensitivity = jax.jvp(lambda w: outputs(w, jode.Backprop()), (w,), (d,))
    beta = -inner(g, d) / N / jnp.mean(sensitivity**2)
    return (along(w, d, beta), d, g, G), (value, depth.roughness(w), w)


def main():
    start = depth.smooth_init(jax.random.key(0), init, N + 1)
    g = slope(start)[1]
    G = depth.sobolev(g, MU)
    first = (start, jax.tree.map(jnp.negative, G), g, G)
    runs = {"gradient descent": jax.lax.scan(descend, start, None, length=20 * STEPS)[1]}
    runs["conjugate gradients, Sobolev"] = jax.lax.scan(conjugate, first, None, length=STEPS)[1]
    goal = max(float(losses[-1]) for losses, *_ in runs.values())
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    fig, axes = plt.subplots(1, 4, figsize=(15, 4.2), layout="constrained")
    axes[3].sharey(axes[2])
    print("| method | steps to equal loss | loss | ∫ ‖dθ/dt‖² dt |\n|---|---:|---:|---:|")
    for k, ((name, (losses, rough, path)), color) in enumerate(zip(runs.items(), ("#2d6ca2", "#c6553b"), strict=True)):
        n = int(jnp.argmax(losses <= goal * (1 + 1e-6)))
        print(f"| {name} | {n} | {losses[n]:.2e} | {rough[n]:.1f} |")
        axes[0].loglog(np.arange(1, len(losses) + 1), losses, color=color)
        axes[1].semilogx(np.arange(1, len(rough) + 1), rough, color=color, label=name)
        axes[1].plot(n + 1, rough[n], "o", color=color)
        axes[2 + k].plot(np.linspace(0, 1, N + 1), path["in"][n].reshape(N + 1, -1)[:, :8], color=color)
        title = f"{name.split(',')[0].capitalize()}, at equal loss"
        axes[2 + k].set(title=title, xlabel="depth t", ylabel="eight entries of $W_1$(t)")
    axes[0].set(title="Loss", xlabel="step", ylabel="mean square error / 2")
    axes[1].set(title="Roughness (dot: at equal loss)", xlabel="step", ylabel="∫ ‖dθ/dt‖² dt", ylim=(0, 1400))
    axes[1].legend(loc="upper left")
    fig.savefig(sys.argv[1] if len(sys.argv) > 1 else "depth_cg.png", dpi=160)


if __name__ == "__main__":
    main()
