"""Training: updates in one scan; an image classifier with its gradient measured, a progress bar with loss, accuracy and NFE."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jode.adjoint import Backprop
from jode.data import Images
from jode.validity import StepAdaptation


class Metrics(NamedTuple):
    """Means over a batch."""

    loss: Array
    accuracy: Array
    nfe: Array
    nfe_backward: Array


@dataclass
class Report:
    """What training one model showed: one row of Table 1 and the curves behind the figure."""

    name: str
    parameters: int
    memory: int  # bytes of temporaries of the gradient of one batch, by XLA's own account
    seconds: list[float] = field(default_factory=list)
    nfe: list[float] = field(default_factory=list)
    nfe_backward: float = 0.0
    errors: list[tuple[int, float]] = field(default_factory=list)  # (step, test error), every epoch

    @property
    def error(self) -> float:
        return self.errors[-1][1]

    @property
    def step_time(self) -> float:
        """Median seconds per training step."""
        return float(np.median(self.seconds))


def objective(solver: Any = None, adjoint: Any = Backprop()) -> Callable:
    """(model, images, labels) -> (mean cross-entropy, `Metrics`) of a batch, for a model like `jode.models.Classifier`."""

    def loss(model: Callable, images: Array, labels: Array) -> tuple[Array, Metrics]:
        logits, (nfe, nfe_backward) = jax.vmap(lambda image: model(image, solver, adjoint))(images)
        value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        return value, Metrics(value, accuracy, jnp.mean(jnp.asarray(nfe)), jnp.mean(jnp.asarray(nfe_backward)))

    return loss


def adapted(adapt: StepAdaptation, logits: Callable, optimizer: optax.GradientTransformation) -> Callable:
    """One iteration of training a classifier with steps that adapt, to be jitted or scanned; it is traced once.

    (weights, optimizer state, step state), (x, y) -> the same after one update on the batch, and (steps, loss, accuracy) of it.
    logits(weights, x, solver) are the class scores of a batch.
    """

    def iteration(carry: tuple, batch: tuple) -> tuple[tuple, tuple]:
        weights, state, control = carry
        x, labels = batch
        solver = adapt.solver(control)

        def right(scores: Array) -> Array:
            return jnp.mean(jnp.argmax(scores, -1) == labels)

        def loss(weights: Any) -> tuple[Array, Array]:
            scores = logits(weights, x, solver)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels)), right(scores)

        (value, accuracy), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
        control, _ = adapt.update(control, accuracy, lambda solver: right(logits(weights, x, solver)))
        updates, state = optimizer.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state, control), (solver.steps, value, accuracy)

    return iteration


def updates(loss: Callable, optimizer: optax.GradientTransformation, count: int) -> Callable:
    """`count` updates of a module as one scan, compiled once: (model, state, key), *data -> (model, state, key), losses (count,).

    loss(model, key, *data) is a scalar; each update gets a key of its own, split from the one that is carried, so that a run that
    goes on from a saved (model, state, key) repeats the bits of one that never stopped. `state` is
    optimizer.init(equinox.filter(model, equinox.is_inexact_array)).
    """

    @eqx.filter_jit
    def run(carry: tuple, *data: Any) -> tuple[tuple, Array]:
        model, state, key = carry
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def update(carry: tuple, _: None) -> tuple[tuple, Array]:
            params, state, key = carry
            key, own = jax.random.split(key)
            value, gradient = jax.value_and_grad(lambda p: loss(eqx.combine(p, static), own, *data))(params)
            change, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, change), state, key), value

        (params, state, key), losses = jax.lax.scan(update, (params, state, key), None, length=count)
        return (eqx.combine(params, static), state, key), losses

    return run


def batches(data: Images, size: int, epochs: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled batches of one size; the few examples left over at the end of an epoch wait for the next shuffle."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(data.labels))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield data.images[chosen], data.labels[chosen]


def fit(
    model: Any,
    train: Images,
    test: Images,
    solver: Any = None,
    adjoint: Any = Backprop(),
    *,
    name: str = "",
    epochs: int,
    batch: int = 128,
    rate: float = 3e-3,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Any, Report]:
    """Train with AdamW under a one-cycle schedule (at most `limit` steps); returns the trained model and a `Report`.

    Args:
        model: a `jode.models.Classifier` or like it, each of whose leaves is a floating array.
        train: images and labels to train on.
        test: and to test on after each epoch.
        solver: handed to the model, model(image, solver, adjoint).
        adjoint: how its gradients are computed.
        name: for the progress bar and the report.
        epochs: how often each image is seen.
        batch: images in one update.
        rate: the highest learning rate.
        limit: at most this many updates.
        seed: of the order of the images.
    """
    from tqdm import tqdm

    per_epoch = len(train.labels) // batch
    steps = min(epochs * per_epoch, limit or epochs * per_epoch)
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(max(steps, 4), rate), weight_decay=1e-4)
    state = optimizer.init(model)
    example = (model, train.images[:batch], train.labels[:batch])
    gradient = jax.jit(jax.grad(objective(solver, adjoint), has_aux=True)).lower(*example).compile()
    memory = gradient.memory_analysis()
    report = Report(name, sum(x.size for x in jax.tree.leaves(model)), memory.temp_size_in_bytes if memory else 0)

    @jax.jit
    def update(model: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, updates), state

    errors = evaluator(solver)
    columns, lines = shutil.get_terminal_size()  # 80 x 24 where the terminal does not say; tqdm alone would then print nothing
    bar = tqdm(
        islice(batches(train, batch, epochs, seed), steps),
        total=steps,
        desc=f"{name:>14}",
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        ncols=min(columns, 100),
        nrows=lines,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    )
    for step, (images, labels) in enumerate(bar, 1):
        start = time.perf_counter()
        gradients, metrics = gradient(model, images, labels)
        model, state = jax.block_until_ready(update(model, state, gradients))
        report.seconds.append(time.perf_counter() - start)
        report.nfe.append(float(metrics.nfe))
        report.nfe_backward = float(metrics.nfe_backward)
        bar.set_postfix(loss=f"{metrics.loss:.3f}", acc=f"{metrics.accuracy:.3f}", nfe=f"{metrics.nfe:.0f}", refresh=False)
        if step % per_epoch == 0 or step == steps:
            report.errors.append((step, errors(model, test)))
    return model, report


def scorer(solver: Any = None, batch: int = 250) -> Callable[[Any, np.ndarray], np.ndarray]:
    """A function (model, images) -> class scores (n, classes), jitted once for one batch size."""
    apply = jax.jit(lambda model, images: jax.vmap(lambda image: model(image, solver)[0])(images))

    def scores(model: Any, images: np.ndarray) -> np.ndarray:
        n, parts = len(images), []
        for start in range(0, n, batch):
            index = np.arange(start, start + batch) % n
            parts.append(np.asarray(apply(model, images[index]))[: min(batch, n - start)])
        return np.concatenate(parts)

    return scores


def evaluator(solver: Any = None, batch: int = 250) -> Callable[[Any, Images], float]:
    """A function (model, data) -> fraction of images misclassified."""
    scores = scorer(solver, batch)
    return lambda model, data: float(np.mean(np.argmax(scores(model, data.images), 1) != data.labels))


def table(reports: list[Report]) -> str:
    """Chen et al.'s Table 1, in Markdown."""
    lines = [
        "| model | test error | parameters | memory of the gradient | time per step | NFE forward | NFE backward |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in reports:
        backward = f"{r.nfe_backward:.1f}" if r.nfe_backward else "–"  # none, or not known to the solve
        nfe = f"{np.mean(r.nfe[-50:]):.1f} | {backward}" if r.nfe and r.nfe[-1] else "– | –"
        left = f"| {r.name} | {100 * r.error:.2f} % | {r.parameters:,} | {r.memory / 2**20:.1f} MiB "
        lines.append(left + f"| {1e3 * r.step_time:.1f} ms | {nfe} |")
    return "\n".join(lines)
