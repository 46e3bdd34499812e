"""Files that are not what they say are refused by name, and never half read."""

import gzip
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from jode import data


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("t10k", 5)):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(rng.integers(0, 256, (n, 4, 4), np.uint8))))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(rng.integers(0, 10, n, np.uint8))))
    return tmp_path


def test_mnist_round_trip(folder):
    train, test = data.mnist(folder)
    assert train.images.shape == (12, 4, 4, 1)
    assert test.labels.shape == (5,)
    assert train.images.dtype == np.float32
    assert 0 <= train.images.min() <= train.images.max() <= 1


def test_every_prefix_and_many_flips_are_refused(folder):
    path = folder / "t10k-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(data.DataError, match=path.name):
            data.read_idx(path)
    rng = np.random.default_rng(1)
    reference, named = gzip.decompress(whole), set()
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(10, len(whole))] ^= 1 << rng.integers(8)  # ten bytes of gzip header carry no data
        path.write_bytes(bytes(damaged))
        try:  # padding bits at the end of the compressed stream carry no data either
            assert idx(data.read_idx(path)) == reference
        except data.DataError as e:
            named.add(path.name in str(e))
    assert named == {True}
    assert len(reference) == 8 + 5


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        (b"", "nothing"),
        (b"\x00\x00\x0d\x01" + bytes(8), "not an IDX file"),
        (struct.pack(">HBBI", 0, 8, 1, 9) + bytes(8), "promises 9 bytes"),
        (struct.pack(">HBBI", 0, 8, 1, 9) + bytes(10), "promises 9 bytes"),
        (b"\x00\x00\x08\x03\x00", "header"),
    ],
)
def test_wrong_contents_are_named(tmp_path, payload, match):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(payload))
    with pytest.raises(data.DataError, match=match):
        data.read_idx(path)


def test_labels_must_fit_images(folder):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(11, np.uint8))))
    with pytest.raises(data.DataError, match="do not fit"):
        data.mnist(folder)


def test_digits_are_split_once_and_for_all():
    train, test = data.digits()
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    again, _ = data.digits()
    assert np.array_equal(train.images, again.images)
    assert train.images.min() == 0
    assert train.images.max() == 1


def test_the_main_job_refuses_a_bad_folder_in_one_line(folder):
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b truncated")
    script = Path(__file__).parent.parent / "examples" / "odenet.py"
    for where, what in ((folder, "train-images"), (folder / "none", "not found")):
        done = subprocess.run([sys.executable, script, "--data", where], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert what in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


# Synthetic sets, and CIFAR-10.


@pytest.mark.parametrize("d", [2, 3, 10, 900])
def test_spheres_are_those_of_the_paper(d):
    x, y = data.spheres(jax.random.key(0), 400, d)
    r = np.linalg.norm(x, axis=1)
    assert x.shape == (400, d)
    assert np.sum(y) == 200
    inside = (r >= 0.25 - 1e-6) & (r <= 0.3 + 1e-6)
    np.testing.assert_array_equal(inside, np.asarray(y) == 1)
    shells = [(r >= a - 1e-6) & (r <= b + 1e-6) for a, b in ((0.1, 0.15), (0.4, 0.45))]
    assert [int(s.sum()) for s in shells] == [100, 100]
    np.testing.assert_allclose(np.mean(r[inside]), 0.25 + 0.05 * d / (d + 1), atol=0.004)  # the mean of u^(1/d)


def test_three_minima_ends_where_the_landscape_says():
    start, basin = data.three_minima(jax.random.key(0), 64)
    assert set(np.unique(basin)) <= {0, 1, 2}
    force = np.polyval(data.LANDSCAPE[::-1], data.MINIMA)
    np.testing.assert_allclose(force, 0, atol=0.02)
    at_rest = np.abs(start[:, 1]) < 0.2
    near = np.argmin(np.abs(start[:, :1] - np.array([data.MINIMA])), 1)
    close = np.min(np.abs(start[:, :1] - np.array([data.MINIMA])), 1) < 0.2
    np.testing.assert_array_equal(np.asarray(basin)[at_rest & close], near[at_rest & close])


def binary(folder, size=10_000 * 3073):
    record = np.zeros(3073, np.uint8)
    record[0], record[1], record[1025] = 3, 255, 51
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (folder / name).write_bytes(np.tile(record, 10_000).tobytes()[:size])


def test_cifar_binaries_are_read_and_truncated_ones_refused(tmp_path):
    binary(tmp_path)
    train, test = data.cifar10(tmp_path)
    assert train.images.shape == (50_000, 32, 32, 3)
    assert test.labels[0] == 3
    np.testing.assert_allclose(test.images[0, 0, 0], [1.0, 0.2, 0.0])
    (tmp_path / "data_batch_2.bin").write_bytes(b"\x00" * 3072)
    with pytest.raises(data.DataError, match=r"data_batch_2.bin: expected 10000 records"):
        data.cifar10(tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(data.DataError, match=r"data_batch_4.bin not found"):
        data.cifar10(tmp_path)


def test_cifar_pictures_are_read_and_bad_ones_refused(tmp_path):
    from PIL import Image

    for part in ("train", "test"):
        for kind in data.CIFAR:
            (tmp_path / part / kind).mkdir(parents=True)
            Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / part / kind / "0.png")
    train, _ = data.cifar10(tmp_path)
    assert train.labels.tolist() == list(range(10))
    np.testing.assert_array_equal(train.images[0, 0, 0], [1, 0, 0])
    archive = tmp_path / "all.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        for part in ("train", "test"):
            tar.add(tmp_path / part, part)
    assert data.cifar10(archive)[1].images.shape == (10, 32, 32, 3)
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(data.DataError, match="truncated or damaged archive"):
        data.cifar10(archive)
    picture = tmp_path / "train" / "cat" / "0.png"
    picture.write_bytes(picture.read_bytes()[:40])
    with pytest.raises(data.DataError, match=r"cat/0.png is truncated"):
        data.cifar10(tmp_path)
    picture.unlink()
    with pytest.raises(data.DataError, match="no images in train/cat"):
        data.cifar10(tmp_path)
    with pytest.raises(data.DataError, match="not found"):
        data.cifar10(tmp_path / "nowhere.tar")
