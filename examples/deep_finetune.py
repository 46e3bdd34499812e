"""From a few tied layers to a very deep network, fine-tuned without stored states (Sander, Ablin & Peyré 2022), on real digits.

    python examples/deep_finetune.py       # five minutes; --data DIR for MNIST's four IDX .gz files

A convolutional network whose 8 layers share one set of weights is trained; the layers are untied into 32, 128 and 512, each a
smaller step of the same depth, and each learns weights of its own with `MemoryFree`. Saves deep_finetune.png.
"""

import argparse
from functools import partial

import equinox as eqx
import jax
import matplotlib.pyplot as plt
import numpy as np

import jode
from jode import data, train
from jode.depth import smoothness, untie
from jode.models import Classifier, Residual

TIED, DEPTHS, WIDTH, SOLVER = 8, (32, 128, 512), 8, jode.Layers(jode.euler)


class Tied(eqx.Module):
    """One block, used in every layer: its gradient is the sum of theirs."""

    net: Classifier

    def __call__(self, image, solver, adjoint=jode.Backprop()):
        return untied(self.net, TIED)(image, solver, adjoint)


def untied(net, depth):
    """A network of many layers for one of one block: the same function to O(1/N), with weights of its own in each layer."""
    return eqx.tree_at(lambda net: net.block, net, untie(net.block, depth))


def memory(net, adjoint, training, batch):
    """MiB of temporaries of the gradient of one batch."""
    images, labels = training.images[:batch], training.labels[:batch]
    gradient = jax.jit(jax.grad(lambda net: train.objective(SOLVER, adjoint)(net, images, labels)[0]))
    return gradient.lower(net).compile().memory_analysis().temp_size_in_bytes / 2**20


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", help="folder of MNIST; scikit-learn's digits if not given")
    p.add_argument("--epochs", type=int, default=15)
    p.add_argument("--out", default="deep_finetune.png")
    args = p.parse_args()
    training, test = data.mnist(args.data) if args.data else data.digits()
    batch, free = 64, jode.MemoryFree(max_drift=1.0)
    start = Tied(Classifier(training.images.shape[1:], WIDTH, block=Residual, key=jax.random.key(0)))
    base, report = train.fit(start, training, test, SOLVER, name=f"{TIED} tied layers", epochs=args.epochs, batch=batch, rate=1e-2)
    rows, after = [], None
    for depth in DEPTHS:
        net = untied(base.net, depth)
        before = train.evaluator(SOLVER)(net, test)
        after, tuned = train.fit(net, training, test, SOLVER, free, name=f"{depth} layers", epochs=5, batch=batch, rate=3e-3)
        least, most = (memory(net, adjoint, training, batch) for adjoint in (free, jode.Backprop(None)))
        rows.append((depth, 100 - 100 * before, 100 - 100 * tuned.error, least, most))
    print(f"\n{TIED} tied layers: {100 - 100 * report.error:.2f} % of test digits right\n")
    print("| layers | untied % | fine-tuned % | memory-free, MiB | backprop, MiB |\n|---:|---:|---:|---:|---:|")
    for row in rows:
        print("| {} | {:.2f} | {:.2f} | {:.2f} | {:.2f} |".format(*row))
    print(f"\nsmoothness N max ‖θ_n+1 - θ_n‖ of the deepest: {smoothness(after.block):.2f}")
    figure(np.array(rows), 100 - 100 * report.error, after.block, args.out)


def figure(rows, start, block, out):
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    fig, (a, b, c) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    depths, before, tuned, free, stored = rows.T
    place = partial(np.linspace, 0, 1)
    a.axhline(start, color="#8a8f98", lw=1, label=f"{TIED} tied layers")
    a.plot(depths, before, "o--", color="#2d6ca2", label="untied")
    a.plot(depths, tuned, "o-", color="#c6553b", label="fine-tuned, memory-free")
    a.set(title="Accuracy", xlabel="layers", ylabel="test digits right, %", xscale="log")
    b.plot(depths, stored, "o-", color="#2d6ca2", label="every state stored")
    b.plot(depths, free, "o-", color="#c6553b", label="memory-free")
    b.set(title="Memory of the gradient", xlabel="layers", ylabel="temporaries, MiB", xscale="log", yscale="log")
    b.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    entries = np.asarray(block.first.conv.weight)
    c.plot(place(len(entries)), (entries - entries.mean(0)).reshape(len(entries), -1)[:, :40], lw=1, color="#2d6ca2", alpha=0.6)
    c.set(title=f"40 weights of {len(entries)} layers, equal at first", xlabel="depth n / N", ylabel="weight - its mean over depth")
    for ax in (a, b):
        ax.set_xticks(depths, [f"{d:.0f}" for d in depths])
        ax.minorticks_off()
        ax.legend()
    fig.savefig(out, dpi=160)
    print(f"figure: {out}")


if __name__ == "__main__":
    main()
