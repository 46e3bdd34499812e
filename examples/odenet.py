"""Is a residual network an ODE solver? Table 1 of Neural ODEs (Chen et al. 2018) on real handwritten digits.

    python examples/odenet.py                              # the 1,797 digits of scikit-learn, a few minutes
    python examples/odenet.py --data DIR --epochs 2 --width 64 --batch 128   # MNIST, from its four IDX .gz files

Prints one table and saves one figure (odenet.png): how a digit travels through the layers of ResNet-6 and through the
depth of ODE-Net, what that costs as training goes on, and what it is good for.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jode
from jode import data, train
from jode.models import MODELS, classifier, features
from jode.models.image import residual, vector_field
from jode.validity import swap

INK, COLOURS = (
    "#22303c",
    dict(zip(MODELS, ["#9aa5b1", "#c3b091", "#7fb3d5", "#2e6f9e", "#e0a458", "#c8553d", "#7a1f3d", "#5b8c5a"], strict=True)),
)


def paths(weights, images):
    """The digits' states at each layer of ResNet-6, and along ODE-Net with the times of its evaluations."""
    res, ode = weights["ResNet-6"], weights["ODE-Net"]
    depths, ts, times, dots = jnp.arange(7.0), jnp.linspace(0, 1, 201), [], []

    def spied(t, y, w):
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return vector_field(t, y, w)

    for x in images:
        times.clear()
        jode.solve(spied, features(ode, x), (0.0, 1.0), ode["block"], solver=MODELS["ODE-Net"][1])
        jax.effects_barrier()
        dots.append(np.array(times))
    layers = jax.vmap(lambda x: jode.odeint(residual, features(res, x), depths, res["block"], solver=jode.Layers(jode.euler)))
    curves = jax.vmap(lambda x: jode.odeint(vector_field, features(ode, x), ts, ode["block"], solver=MODELS["ODE-Net"][1]))
    return flatten(layers(images)), ts, flatten(curves(images)), dots


def flatten(states):
    """Each path as its coordinate along the direction in which the paths' ends differ most."""
    states = np.asarray(states).reshape(*states.shape[:2], -1)
    ends = states[:, -1] - states[:, -1].mean(0)
    return states @ np.linalg.svd(ends, full_matrices=False)[2][0]


def verdict(weights, test, width, images=1000):
    """ODE-Net under other solvers than its own: is it an ODE?"""
    trained = MODELS["ODE-Net"][1]
    solvers = [trained, jode.Adaptive(jode.dopri5, 1e-5, 1e-5), jode.Adaptive(jode.tsit5, 1e-4, 1e-4), jode.Fixed(jode.rk4, 16)]
    some = data.Images(test.images[:images], test.labels[:images])

    def accuracy(solver):
        model = classifier("ODE-Net", test.images.shape[1:], width, solver=solver)
        return 1 - train.evaluator(model)(weights["ODE-Net"], some)

    return swap(accuracy, solvers)


def figure(reports, weights, images, labels, out):
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK})
    fig, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    layers, ts, curves, dots = paths(weights, images)
    for z, y, where, label in zip(layers, curves, dots, labels, strict=True):
        shade = plt.get_cmap("tab10")(int(label))
        a.plot(range(7), z, "-", color=shade, lw=1.2, alpha=0.7)
        a.plot(range(7), z, "o", color=shade, ms=4)
        b.plot(ts, y, "-", color=shade, lw=1.4, alpha=0.8)
        b.plot(where, np.interp(where, ts, y), "o", color=shade, ms=3.2)
        b.annotate(str(label), (1.0, y[-1]), (6, -3), textcoords="offset points", color=shade, weight="bold")
    a.set(title="ResNet-6: six jumps, one evaluation each", xlabel="layer", ylabel="state, main direction")
    b.set(title="ODE-Net: one flow, a dot where f was evaluated", xlabel="depth t", ylabel="state, main direction")
    for r in reports:
        if r.nfe[-1]:
            c.plot(np.arange(1, len(r.nfe) + 1), r.nfe, color=COLOURS[r.name], lw=1.6, label=r.name)
        steps, errors = zip(*r.errors, strict=True)
        d.plot(steps, [100 * (1 - e) for e in errors], "o-", ms=3, color=COLOURS[r.name], lw=1.6, label=r.name)
    c.set(title="Evaluations of f for one image", xlabel="training step", ylabel="NFE, mean of the batch", ylim=(0, None))
    worst = min(100 * (1 - r.error) for r in reports)
    d.set(title="Accuracy on the test digits", xlabel="training step", ylabel="%", ylim=(max(0, worst - 4), 100.2))
    c.legend(frameon=False)
    d.legend(frameon=False, loc="lower right")
    fig.savefig(out, dpi=160)


def main():
    p = argparse.ArgumentParser(description="Table 1 of Neural ODEs on real digits.")
    p.add_argument("--data", help="folder with MNIST's four IDX .gz files (default: scikit-learn's digits)")
    p.add_argument("--epochs", type=int, default=9)
    p.add_argument("--width", type=int, default=32, help="channels (64 in the paper)")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--limit", type=int, help="at most this many training steps a model")
    p.add_argument("--out", type=Path, default=Path("odenet.png"), help="where the figure goes; a .json of the numbers beside it")
    args = p.parse_args()
    try:
        training, test = data.mnist(args.data) if args.data else data.digits()
    except data.DataError as e:
        print(f"odenet: {e}", file=sys.stderr)
        sys.exit(2)
    weights, reports = {}, []
    for name in MODELS:
        model = classifier(name, training.images.shape[1:], args.width)
        weights[name], report = train.fit(model, training, test, epochs=args.epochs, batch=args.batch, limit=args.limit)
        reports.append(report)
    print("\n" + train.table(reports))
    print(f"\nODE-Net, test accuracy under other solvers:\n\n{verdict(weights, test, args.width)}")
    args.out.with_suffix(".json").write_text(json.dumps([asdict(r) for r in reports]))
    first = [int(np.flatnonzero(test.labels == k)[0]) for k in range(10)]
    figure(reports, weights, test.images[first], test.labels[first], args.out)
    print(f"\nfigure: {args.out}")


if __name__ == "__main__":
    main()
