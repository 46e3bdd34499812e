"""Files that are not what they say are refused by name, and never half read."""

import gzip
import struct
import subprocess
import sys
from pathlib import Path

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
