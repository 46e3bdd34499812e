"""Data of the experiments: real digits and images from their standard files, and synthetic sets drawn from a key."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jode.control import Fixed
from jode.ivp import odeint
from jode.method import rk4


class DataError(ValueError):
    """A data file that is missing, truncated or not what its name says."""


class Images(NamedTuple):
    """Images in [0, 1], shape (N, height, width, channels), and integer labels (N,)."""

    images: np.ndarray
    labels: np.ndarray


def digits(test: int = 360, seed: int = 0) -> tuple[Images, Images]:
    """The 1,797 handwritten 8x8 digits of scikit-learn as (train, test), split by a fixed permutation."""
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    order = np.random.default_rng(seed).permutation(len(raw.target))
    images = (raw.images[order] / 16.0).astype(np.float32)[..., None]
    labels = raw.target[order].astype(np.int32)
    return Images(images[test:], labels[test:]), Images(images[:test], labels[:test])


def mnist(folder: str | Path) -> tuple[Images, Images]:
    """MNIST as (train, test) from the four standard IDX .gz files in `folder`; raises `DataError` naming a bad one."""
    pairs = []
    for part in ("train", "t10k"):
        images = read_idx(Path(folder) / f"{part}-images-idx3-ubyte.gz")
        path = Path(folder) / f"{part}-labels-idx1-ubyte.gz"
        labels = read_idx(path)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(f"{path}: {labels.shape} labels do not fit images of shape {images.shape}")
        pairs.append(Images((images / np.float32(255))[..., None], labels.astype(np.int32)))
    return pairs[0], pairs[1]


def read_idx(path: str | Path) -> np.ndarray:
    """An unsigned-byte array from a gzipped IDX file: magic 0x0000 08 ndim, big-endian sizes, then the bytes.

    Raises `DataError`, naming the file, where it is missing, truncated, damaged, of another type, or has trailing bytes.
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes())
    except OSError as e:
        reason = "not found" if isinstance(e, FileNotFoundError) else f"cannot be read as gzip ({e})"
        raise DataError(f"{path}: {reason}") from e
    except (EOFError, zlib.error) as e:
        raise DataError(f"{path}: truncated or damaged gzip ({e})") from e
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or raw[3] == 0:
        raise DataError(f"{path}: not an IDX file of unsigned bytes (it starts with {raw[:4].hex() or 'nothing'})")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise DataError(f"{path}: truncated in its header")
    shape = struct.unpack(f">{raw[3]}I", raw[4:start])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(raw) - start != expected:
        raise DataError(f"{path}: its header promises {expected} bytes of shape {shape}, it holds {len(raw) - start}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def spheres(key: Array, n: int, d: int = 2) -> tuple[Array, Array]:
    """Concentric spheres in d dimensions, (n, d) points and (n,) labels: class 1 between two shells of class 0 (Ott et al.
    2021).

    A quarter of the points has radii in [0.1, 0.15], a half (class 1) in [0.25, 0.3], a quarter in [0.4, 0.45]:
    r = r_min + (r_max - r_min) u^(1/d), u uniform, in directions uniform on the sphere. Points come in random order.
    """
    if n < 4 or d < 1:
        raise ValueError(f"spheres: want at least 4 points in at least 1 dimension, got n = {n}, d = {d}")
    shells = ((0.1, 0.15, 0, n // 4), (0.25, 0.3, 1, n // 2), (0.4, 0.45, 0, n - n // 4 - n // 2))
    low, high, labels = (np.concatenate([np.full(s[3], s[i]) for s in shells]) for i in range(3))
    a, b, c = jax.random.split(key, 3)
    direction = jax.random.normal(a, (n, d))
    direction = direction / jnp.linalg.norm(direction, axis=1, keepdims=True)
    low, high = jnp.asarray(low, direction.dtype), jnp.asarray(high, direction.dtype)
    radius = low + (high - low) * jax.random.uniform(b, (n,), direction.dtype) ** (1 / d)
    order = jax.random.permutation(c, n)
    return (radius[:, None] * direction)[order], jnp.asarray(labels, jnp.int32)[order]


# V'(x), from the constant to x⁵; its minima.
LANDSCAPE = (-0.192, 0.176, 2.364, -0.768, -2.5, 1.2)
MINIMA = (-0.850, 0.269, 1.839)


def three_minima(key: Array, n: int) -> tuple[Array, Array]:
    """Initial states (x, v) of a particle in a landscape with three minima, (n, 2), and the minimum it ends in, (n,): Ott et
    al. 2021.

    d²x/dt² = -V'(x) - 0.2 dx/dt, x0 uniform in [-1, 2], v0 in [-2, 2]; 5,000 steps of RK4 to t = 100.
    """
    low, high = jnp.array([-1.0, -2.0]), jnp.array([2.0, 2.0])
    start = jax.random.uniform(key, (n, 2), minval=low, maxval=high)

    def field(t: Array, y: Array, args: None) -> Array:
        return jnp.stack([y[1], -jnp.polyval(jnp.asarray(LANDSCAPE[::-1], y.dtype), y[0]) - 0.2 * y[1]])

    ends = jax.jit(jax.vmap(lambda y: odeint(field, y, (0.0, 100.0), solver=Fixed(rk4, 5000))[-1]))(start)
    gaps = jnp.abs(ends[:, :1] - jnp.asarray([MINIMA], ends.dtype))
    return start, jnp.argmin(gaps, axis=1).astype(jnp.int32)


CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(path: str | Path) -> tuple[Images, Images]:
    """CIFAR-10 as (train, test), from a folder or a .tar, .tar.gz or .tar.xz of it; raises `DataError` naming a bad file.

    It holds either the standard binary batches, data_batch_1.bin … data_batch_5.bin and test_batch.bin (10,000 records of 3,073
    bytes: the label and three 32x32 planes), or a copy as images, `train/<class>/*.jpg` (or .png) and `test/<class>/*`; these
    take Pillow. JPEG is lossy: say so beside an accuracy.
    """
    path = Path(path)
    files = _members(path)
    binary = [k for k in files if k.endswith(".bin") and "batch" in Path(k).name]
    if binary:
        named = {Path(k).name: k for k in binary}
        wanted = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
        if missing := [k for k in wanted if k not in named]:
            raise DataError(f"{path}: {', '.join(missing)} not found")
        parts = [_records(f"{path}: {k}", files[named[k]]()) for k in wanted]
        return Images(*(np.concatenate(x) for x in zip(*parts[:5], strict=True))), parts[5]
    return _pictures(path, files, "train"), _pictures(path, files, "test")


def _members(path: Path) -> dict[str, Callable[[], bytes]]:
    """Files by name, each with a function that reads it."""
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_bytes for p in sorted(path.rglob("*")) if p.is_file()}
    try:
        with tarfile.open(path) as archive:
            contents = {m.name: archive.extractfile(m) for m in archive if m.isfile()}
            read = {k: f.read() for k, f in contents.items() if f is not None}
    except FileNotFoundError as e:
        raise DataError(f"{path}: not found") from e
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as e:
        raise DataError(f"{path}: truncated or damaged archive ({e})") from e
    return {k: lambda v=v: v for k, v in sorted(read.items())}


def _records(where: str, raw: bytes) -> Images:
    if len(raw) != 10_000 * 3073:
        raise DataError(f"{where}: expected 10000 records of 3073 bytes, 30730000 in all, got {len(raw)}")
    records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise DataError(f"{where}: label {records[:, 0].max()} is not one of ten classes")
    pixels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Images(pixels / np.float32(255), records[:, 0].astype(np.int32))


def _pictures(path: Path, files: dict[str, Callable[[], bytes]], part: str) -> Images:
    from PIL import Image

    images, labels = [], []
    for label, kind in enumerate(CIFAR):
        names = [k for k in files if k.startswith(f"{part}/{kind}/") or f"/{part}/{kind}/" in k]
        if not names:
            raise DataError(f"{path}: no images in {part}/{kind}, and no data_batch_1.bin either")
        for k in names:
            try:
                pixels = np.asarray(Image.open(io.BytesIO(files[k]())).convert("RGB"))
            except OSError as e:
                raise DataError(f"{path}: {k} is truncated or not an image ({e})") from e
            if pixels.shape != (32, 32, 3):
                raise DataError(f"{path}: {k} is {pixels.shape[0]}x{pixels.shape[1]}, not 32x32")
            images.append(pixels)
            labels.append(label)
    counts = {labels.count(k) for k in range(10)}
    if len(counts) > 1:
        raise DataError(f"{path}: classes of {part} have {sorted(counts)} images; CIFAR-10 has equally many of each")
    return Images(np.stack(images) / np.float32(255), np.asarray(labels, np.int32))


# Densities in the plane.


def moons(key: Array, n: int, noise: float = 0.1) -> Array:
    """Two interleaved half circles of radius 1, (n, 2): around (0, 0) the upper, around (1, 1/2) the lower; normal noise."""
    a, b, c = jax.random.split(key, 3)
    angle, lower = jnp.pi * jax.random.uniform(a, (n,)), jax.random.bernoulli(b, 0.5, (n,))
    x = jnp.where(lower, 1 - jnp.cos(angle), jnp.cos(angle))
    y = jnp.where(lower, 0.5 - jnp.sin(angle), jnp.sin(angle))
    return jnp.stack([x, y], 1) + noise * jax.random.normal(c, (n, 2))


def circles(key: Array, n: int, noise: float = 0.06, factor: float = 0.5) -> Array:
    """Two circles around the origin, of radii 1 and `factor`, each with half of the points in the mean, (n, 2); normal noise."""
    a, b, c = jax.random.split(key, 3)
    angle = 2 * jnp.pi * jax.random.uniform(a, (n,))
    radius = jnp.where(jax.random.bernoulli(b, 0.5, (n,)), 1.0, factor).astype(angle.dtype)
    return radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1) + noise * jax.random.normal(c, (n, 2))


def gaussians(key: Array, n: int, noise: float = 0.1**0.5, radius: float = 5.0, modes: int = 8) -> Array:
    """`modes` normal densities of standard deviation `noise`, evenly on a circle around the origin, (n, 2)."""
    a, b = jax.random.split(key)
    angle = 2 * jnp.pi / modes * jax.random.randint(a, (n,), 0, modes).astype(jnp.result_type(float))
    return radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1) + noise * jax.random.normal(b, (n, 2))


def checkerboard(key: Array, n: int) -> Array:
    """The dark squares, of side 1, of a 4x4 board on [-2, 2]², (n, 2): density 1/8 on them and 0 elsewhere."""
    a, b = jax.random.split(key)
    square = jax.random.randint(a, (n,), 0, 8)
    column, row = square // 2, 2 * (square % 2)
    corner = jnp.stack([column, row + column % 2], 1).astype(jnp.result_type(float)) - 2
    return corner + jax.random.uniform(b, (n, 2))


def s_curve(key: Array, n: int, noise: float = 0.05) -> Array:
    """Two three-quarter circles that join to an S, seen from the side, (n, 2): (sin a, ±(cos a - 1)), a in [-3π/2, 3π/2]."""
    a, b = jax.random.split(key)
    angle = 3 * jnp.pi * (jax.random.uniform(a, (n,)) - 0.5)
    return jnp.stack([jnp.sin(angle), jnp.sign(angle) * (jnp.cos(angle) - 1)], 1) + noise * jax.random.normal(b, (n, 2))
