"""Real digits: those scikit-learn ships, and MNIST in its IDX .gz format."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


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
