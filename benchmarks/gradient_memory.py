"""Memory of the gradient of a residual network against its depth: the figure of Sander, Ablin & Peyré 2022.

d = 500, hidden 8, batch 500, weights of their own in each layer. python -m benchmarks.gradient_memory
"""

from benchmarks.measure import report, save

import jax
import jax.numpy as jnp

import jode

WIDTH, HIDDEN, BATCH = 500, 8, 500
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 100, 151, 200, 300)
ADJOINTS = {
    "Backprop(None): every state": (jode.euler, jode.Backprop(None)),
    "Backprop(16): 16 states": (jode.euler, jode.Backprop(16)),
    "MemoryFree, Euler": (jode.euler, jode.MemoryFree()),
    "MemoryFree, leapfrog": (jode.leapfrog, jode.MemoryFree()),
}


def main(quick=False):
    rows, curves, depths = [], {}, DEPTHS[::5] if quick else DEPTHS
    for name, (method, adjoint) in ADJOINTS.items():
        for depth in depths:
            temporaries = memory(method, adjoint, depth)
            curves.setdefault(name, []).append(temporaries)
            rows.append([depth, name, f"{temporaries:.2f}"])
    report(
        "gradient_memory", f"Residual network, width {WIDTH}, batch {BATCH}", ["depth", "solver", "temporaries MiB"], rows, quick
    )
    draw(curves, depths, quick)


def block(t, x, w):
    return jnp.tanh(x @ w[0]) @ w[1]


def memory(method, adjoint, depth):
    """MiB of temporaries of the gradient, by XLA's own analysis: weights and their gradients are not counted."""

    def loss(w, x):
        return jnp.mean(jode.odeint(block, x, (0.0, 1.0), w, solver=jode.Layers(method), adjoint=adjoint)[-1] ** 2)

    shape = jax.ShapeDtypeStruct
    w = (shape((depth, WIDTH, HIDDEN), jnp.float32), shape((depth, HIDDEN, WIDTH), jnp.float32))
    program = jax.jit(jax.grad(loss)).lower(w, shape((BATCH, WIDTH), jnp.float32)).compile()
    return program.memory_analysis().temp_size_in_bytes / 2**20


def draw(curves, depths, quick):
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for (name, values), color in zip(curves.items(), ("#2d6ca2", "#7fb2d5", "#c6553b", "#dfa053"), strict=True):
        ax.plot(depths, values, "o-", label=name, color=color)
        ax.annotate(f"{values[-1]:.0f} MiB", (depths[-1], values[-1]), (6, -3), textcoords="offset points", color=color)
    ax.set(xlabel="depth", ylabel="temporaries of the gradient, MiB", ylim=(0, None), xlim=(0, 335))
    ax.set_title("Memory of a residual network's gradient")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    save(figure, "gradient_memory", quick)
    plt.close(figure)


if __name__ == "__main__":
    main()
