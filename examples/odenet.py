"""Is a residual network an ODE solver? Table 1 of Neural ODEs (Chen et al. 2018) on real handwritten digits.

    python examples/odenet.py                              # the 1,797 digits of scikit-learn, a few minutes
    python examples/odenet.py --data DIR --epochs 2 --width 64 --batch 128   # MNIST, from its four IDX .gz files

Prints one table and saves one figure (odenet.png): how a digit travels through the layers of ResNet-6 and through the
depth of ODE-Net, how many evaluations that takes as training goes on, and the error on the test digits. Errors depend on the seed:
run `--seed 0`, `--seed 1`, … and compare the last `errors` in the .json files beside the figures.
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

import jode
from jode import data, train
from jode.models import MODELS, vector_field
from jode.validity import swap

INK, COLOURS = (
    "#22303c",
    dict(zip(MODELS, ["#9aa5b1", "#c3b091", "#7fb3d5", "#2e6f9e", "#e0a458", "#c8553d", "#7a1f3d", "#5b8c5a"], strict=True)),
)


def paths(models, images):
    """The digits' states at each layer of ResNet-6, and along ODE-Net with the times of its evaluations."""
    ts, times, dots = jnp.linspace(0, 1, 201), [], []

    def path(name, ts, x, f=vector_field):
        return jode.odeint(f, models[name].features(x), ts, models[name].block, solver=MODELS[name].solver)

    def spied(t, y, w):
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return w(t, y)

    for x in images:
        times.clear()
        path("ODE-Net", (0.0, 1.0), x, spied)
        jax.effects_barrier()
        dots.append(np.array(times))
    layers, curves = (jax.vmap(partial(path, *of))(images) for of in (("ResNet-6", jnp.arange(7.0)), ("ODE-Net", ts)))
    return flatten(layers), ts, flatten(curves), dots


def flatten(states):
    """Each path as its coordinate along the direction in which the paths' ends differ most."""
    states = np.asarray(states).reshape(*states.shape[:2], -1)
    ends = states[:, -1] - states[:, -1].mean(0)
    return states @ np.linalg.svd(ends, full_matrices=False)[2][0]


def verdict(model, test, images=2000):
    """ODE-Net under other solvers than its own: is it an ODE? By right and wrong of each image, with measured errors of solvers."""
    trained = MODELS["ODE-Net"].solver
    solvers = [trained, jode.Adaptive(jode.dopri5, 1e-5, 1e-5), jode.Adaptive(jode.tsit5, 1e-4, 1e-4), jode.Fixed(jode.rk4, 16)]
    scores = cache(lambda solver: train.scorer(solver)(model, test.images[:images]))
    right = lambda solver: np.argmax(scores(solver), 1) == test.labels[:images]
    return swap(right, solvers, outputs=scores, reference=jode.Fixed(jode.rk4, 64), better="higher", of="ODE-Net")


def apart(y, gap):
    """Heights for labels of the values y, in the same order: neighbours closer than `gap` push each other away."""
    order = np.argsort(y)
    z = np.array(y, float)[order]
    for _ in range(200):
        push = np.maximum(gap - np.diff(z), 0) / 2
        z += np.append(0, push) - np.append(push, 0)
    return z[np.argsort(order)]


def figure(reports, models, images, labels, out):
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK})
    fig, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    layers, ts, curves, dots = paths(models, images)
    for ax, ends in ((a, layers[:, -1]), (b, curves[:, -1])):
        for label, end in zip(labels, apart(ends, 0.05 * np.ptp(ends)), strict=True):
            shade = plt.get_cmap("tab10")(int(label))
            ax.annotate(str(label), (1.02, end), xycoords=("axes fraction", "data"), va="center", color=shade, weight="bold")
    for z, y, where, label in zip(layers, curves, dots, labels, strict=True):
        shade = plt.get_cmap("tab10")(int(label))
        a.plot(range(7), z, "-", color=shade, lw=1.2, alpha=0.7)
        a.plot(range(7), z, "o", color=shade, ms=4)
        b.plot(ts, y, "-", color=shade, lw=1.4, alpha=0.8)
        b.plot(where, np.interp(where, ts, y), "o", color=shade, ms=3.2)
    a.set(title="ResNet-6: six jumps, one evaluation each", xlabel="layer", ylabel="state, main direction")
    b.set(title="ODE-Net: one flow, a dot where f was evaluated", xlabel="depth t", ylabel="state, main direction")
    for r in reports:
        if r.nfe[-1]:
            c.plot(np.arange(1, len(r.nfe) + 1), r.nfe, color=COLOURS[r.name], lw=1.6)
        steps, errors = zip(*r.errors, strict=True)
        d.plot(steps, 100 * np.maximum(errors, 1e-3), "o-", ms=3, color=COLOURS[r.name], lw=1.6, label=r.name)
    c.set(title="Evaluations of f for one image", xlabel="training step", ylabel="NFE, mean over the batch", ylim=(0, None))
    d.set(title="Error on the test digits", xlabel="training step", ylabel="test error, %", xlim=(0, None), yscale="log")
    d.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    d.yaxis.set_major_formatter("{x:g}")
    d.minorticks_off()
    fig.legend(*d.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    fig.savefig(out, dpi=160)


def main():
    p = argparse.ArgumentParser(description="Table 1 of Neural ODEs on real digits.")
    p.add_argument("--data", help="folder with MNIST's four IDX .gz files (default: scikit-learn's digits)")
    p.add_argument("--epochs", type=int, default=9)
    p.add_argument("--width", type=int, default=32, help="channels (64 in the paper)")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--limit", type=int, help="at most this many training steps for each model")
    p.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the images")
    p.add_argument("--out", type=Path, default=Path("odenet.png"), help="where the figure goes; a .json of the numbers beside it")
    args = p.parse_args()
    try:
        training, test = data.mnist(args.data) if args.data else data.digits()
    except data.DataError as e:
        print(f"odenet: {e}", file=sys.stderr)
        sys.exit(2)
    models, reports = {}, []
    settings = {"epochs": args.epochs, "batch": args.batch, "limit": args.limit, "seed": args.seed}
    for name, (make, solver, adjoint) in MODELS.items():
        model = make(training.images.shape[1:], args.width, key=jax.random.key(args.seed))
        models[name], report = train.fit(model, training, test, solver, adjoint, name=name, **settings)
        reports.append(report)
    print("\n" + train.table(reports))
    print(f"\nIs ODE-Net an ODE? Test accuracy under other solvers:\n\n{verdict(models['ODE-Net'], test)}")
    args.out.with_suffix(".json").write_text(json.dumps([asdict(r) for r in reports]))
    first = [int(np.flatnonzero(test.labels == k)[0]) for k in range(10)]
    figure(reports, models, test.images[first], test.labels[first], args.out)
    print(f"\nfigure: {args.out}")


if __name__ == "__main__":
    main()
