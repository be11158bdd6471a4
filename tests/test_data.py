"""The data: found, downloaded from a real local server, refused, damaged, fallen back from; never half-written."""

import gzip
import hashlib
import http.server
import socket
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.datasets import MNIST

from planar_helpers import data
from planar_helpers.data import Images, binarise, load_images, to_float


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in MNIST's IDX form."""
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def small_mnist(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Four files in MNIST's form, of 30 and 10 random images, with the checksums that go with them."""
    generator = np.random.default_rng(0)
    files = {}
    for part, n in (("train", 30), ("t10k", 10)):
        files[f"{part}-images-idx3-ubyte"] = idx(generator.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx(generator.integers(0, 10, n, dtype=np.uint8))
    monkeypatch.setattr(data, "MNIST_MD5", {name: hashlib.md5(raw).hexdigest() for name, raw in files.items()})
    monkeypatch.delenv("PLANAR_DATA", raising=False)
    return files


def put(root: Path, files: dict[str, bytes]) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # the discard port: refused at once


def test_mnist_is_found_in_root_and_through_the_environment(small_mnist, tmp_path, monkeypatch, capsys) -> None:
    put(tmp_path, small_mnist)
    for images in (load_images(root=tmp_path), load_images("mnist", str(tmp_path))):
        assert images.train.shape == (30, 784) and images.test.shape == (10, 784) and images.name == "MNIST"
        assert images.train.dtype == torch.uint8 and images.train_labels.dtype == torch.int64
    assert images.train.flatten().numpy().tobytes() == small_mnist["train-images-idx3-ubyte"][16:]
    monkeypatch.setenv("PLANAR_DATA", str(tmp_path))
    assert torch.equal(load_images().test, images.test)
    assert "MNIST: 30 training and 10 test images" in capsys.readouterr().out


def test_a_damaged_file_is_an_error_that_names_it(small_mnist, tmp_path) -> None:
    put(tmp_path, small_mnist)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="damaged t10k-images"):
        load_images(root=tmp_path)


def test_only_the_files_with_checksums_are_read(small_mnist, tmp_path) -> None:
    put(tmp_path, small_mnist)
    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):  # torchvision's MNIST class would take these
        torch.save((torch.full((3, 28, 28), 7, dtype=torch.uint8), torch.zeros(3)), processed / name)
    assert load_images(root=tmp_path).train.shape == (30, 784)


def test_a_download_from_a_real_server_arrives_whole(small_mnist, tmp_path, monkeypatch) -> None:
    packed = {f"{name}.gz": gzip.compress(raw) for name, raw in small_mnist.items()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = packed[self.path.strip("/")]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
    monkeypatch.setattr(MNIST, "resources", resources)
    try:
        assert load_images(root=tmp_path).train.shape == (30, 784)
        raw = tmp_path / "MNIST" / "raw"
        assert sorted(p.name for p in raw.iterdir()) == sorted(small_mnist)
        assert [p.name for p in tmp_path.iterdir()] == ["MNIST"]  # nothing temporary is left
    finally:
        server.shutdown()
        server.server_close()
    monkeypatch.setattr(MNIST, "mirrors", [])
    assert load_images(root=tmp_path).name == "MNIST"  # now from disk


def test_auto_falls_back_to_the_digits_and_says_so(no_server, small_mnist, tmp_path, capsys) -> None:
    assert load_images(root=tmp_path).name == "digits"
    assert "falling back to the embedded digits" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        load_images("mnist", tmp_path)


def test_a_server_that_never_answers_costs_seconds(small_mnist, tmp_path, monkeypatch) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(MNIST, "mirrors", 50 * [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.5)
    start = time.monotonic()
    assert load_images(root=tmp_path).name == "digits"
    assert time.monotonic() - start < 15  # fifty mirrors in turn would take 25 seconds
    assert socket.getdefaulttimeout() is None
    silent.close()


def test_a_server_that_speaks_no_http_is_fallen_back_from(small_mnist, tmp_path, monkeypatch) -> None:
    server = socket.create_server(("127.0.0.1", 0))

    def babble() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.recv(1000)
            connection.sendall(b"220 hello\r\n\r\n")
            connection.close()

    threading.Thread(target=babble, daemon=True).start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
    assert load_images(root=tmp_path).name == "digits"
    monkeypatch.setattr(data, "_await_an_answer", lambda: None)
    assert load_images(root=tmp_path).name == "digits" and list(tmp_path.iterdir()) == []
    server.close()


def test_the_digits_are_those_of_scikit_learn(digits: Images) -> None:
    assert digits.train.shape == (1497, 784) and digits.test.shape == (300, 784)
    assert digits.train.dtype == torch.uint8 and digits.train_labels.dtype == torch.int64
    pixels = torch.cat([digits.train, digits.test]).view(-1, 28, 28)
    assert pixels[:, :4].sum() == 0 and pixels[:, :, -4:].sum() == 0
    labels = torch.cat([digits.train_labels, digits.test_labels])
    bunch = load_digits()
    assert labels.bincount().tolist() == np.bincount(bunch.target).tolist()
    # A downscaled image is nearest to its own scan: the shuffle moved images and labels together.
    small = torch.nn.functional.adaptive_avg_pool2d(pixels[:, 4:24, 4:24].float().unsqueeze(1), 8).flatten(1)
    scans = torch.from_numpy(bunch.data).float() * 255 / 16
    nearest = torch.cdist(small[:200], scans).argmin(1)
    assert (torch.from_numpy(bunch.target)[nearest] == labels[:200]).float().mean() > 0.97
    assert torch.equal(load_images("digits").train, digits.train)


def test_bytes_become_greys_in_one_place() -> None:
    x = to_float(torch.arange(256, dtype=torch.uint8))
    assert x.dtype == torch.float32 and x.min() == 0 and x.max() == 1 and (x.diff() > 0).all()
    with pytest.raises(TypeError, match="uint8"):
        to_float(x)


def test_binarised_pixels_are_drawn_with_their_greys_as_probabilities() -> None:
    grey = torch.tensor([0, 51, 128, 255], dtype=torch.uint8).repeat(20_000, 1)
    images = Images(grey, torch.zeros(20_000), grey[:5], torch.zeros(5), "grey")
    binary = binarise(images, seed=3)
    assert set(binary.train.unique().tolist()) == {0, 255} and binary.train.dtype == torch.uint8
    share = (binary.train == 255).float().mean(0)
    expected = to_float(grey[0])
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / 20_000).sqrt()).all()
    assert torch.equal(binary.train, binarise(images, seed=3).train)
    assert not torch.equal(binary.train, binarise(images, seed=4).train)
    assert "binarised" in binary.name


def test_bad_names_and_roots_get_a_clear_error(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="name must be"):
        load_images("minst")
    missing = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match="root must name an existing folder"):
        load_images(root=missing)
    with pytest.raises(FileNotFoundError, match="root must name an existing folder"):
        load_images("digits", root=missing)
    monkeypatch.setenv("PLANAR_DATA", str(missing))
    with pytest.raises(FileNotFoundError, match="PLANAR_DATA must name an existing folder"):
        load_images()
    assert not missing.exists()
