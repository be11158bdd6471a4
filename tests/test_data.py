"""The data: found in whatever form it lies, refused if damaged, fallen back from out loud; the digits and bytes."""

import gzip
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from planar_helpers import data, download
from planar_helpers.data import Images, binarise, hold_out, load_images, to_float


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in MNIST's IDX form."""
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def small_mnist(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Four files in MNIST's form, of 30 and 10 random images, with the checksums that go with them; no network."""
    generator = np.random.default_rng(0)
    files = {}
    for part, n in (("train", 30), ("t10k", 10)):
        files[f"{part}-images-idx3-ubyte"] = idx(generator.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx(generator.integers(0, 10, n, dtype=np.uint8))
    for name, raw in files.items():
        monkeypatch.setitem(download.MNIST_MD5, name, hashlib.md5(raw).hexdigest())
    monkeypatch.delenv("PLANAR_DATA", raising=False)

    def no_network() -> dict[str, bytes]:
        raise OSError("no server answered")

    monkeypatch.setattr(data, "download_mnist", no_network)
    return files


def put(root: Path, files: dict[str, bytes], folder: str = "MNIST/raw") -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def listing(root: Path) -> list[Path]:
    return sorted(root.rglob("*"))


def test_mnist_is_found_in_root_and_through_the_environment(small_mnist, tmp_path, monkeypatch, capsys) -> None:
    put(tmp_path, small_mnist)
    for images in (load_images(root=tmp_path), load_images("mnist", str(tmp_path))):
        assert images.train.shape == (30, 784) and images.test.shape == (10, 784) and images.name == "MNIST"
        assert images.train.dtype == torch.uint8 and images.train_labels.dtype == torch.int64
    for part, prefix in (("train", "train"), ("test", "t10k")):
        pixels = small_mnist[f"{prefix}-images-idx3-ubyte"][16:]
        assert getattr(images, part).flatten().numpy().tobytes() == pixels
        assert getattr(images, f"{part}_labels").tolist() == list(small_mnist[f"{prefix}-labels-idx1-ubyte"][8:])
    monkeypatch.setenv("PLANAR_DATA", str(tmp_path))
    assert torch.equal(load_images().test, images.test)
    assert capsys.readouterr().out == 3 * "MNIST: 30 training and 10 test images\n"


def dotted(name: str) -> str:
    return name.replace("-idx", ".idx")


RENAMED: dict[str, Callable[[str], str]] = {
    "as torchvision": lambda name: name,
    "gz": lambda name: name + ".gz",
    "dotted": dotted,
    "dotted gz": lambda name: dotted(name) + ".gz",
    "upper case": lambda name: name.upper() + ".GZ",
    "in folders of their own": lambda name: f"{name}/{name}",
    "dotted in folders": lambda name: f"{dotted(name)}/{name}",
    "gz by name only": lambda name: name + ".gz ",
    "mixture": lambda name: {"i": dotted(name), "l": name + ".gz"}[name.split("-")[1][0]],
}


@pytest.mark.parametrize("form", RENAMED)
@pytest.mark.parametrize("folder", ["MNIST/raw", "", "raw", "MNIST", "mnist/RAW"])
def test_mnist_is_found_in_the_forms_people_have_it(small_mnist, tmp_path, form: str, folder: str) -> None:
    renamed = {}
    for name, content in small_mnist.items():
        path = RENAMED[form](name)
        packed = path.lower().endswith(".gz")
        renamed[path.strip()] = gzip.compress(content) if packed else content
    put(tmp_path, renamed, folder)
    before = listing(tmp_path)
    assert load_images(root=tmp_path).train.shape == (30, 784)
    assert listing(tmp_path) == before  # nothing is written merely to read


@pytest.mark.parametrize("named", ["MNIST", "MNIST/raw"])
def test_root_may_name_a_folder_further_down(small_mnist, tmp_path, named: str) -> None:
    put(tmp_path, small_mnist)
    assert load_images(root=tmp_path / named).name == "MNIST"


def test_a_linked_folder_is_looked_into_and_another_data_sets_is_not(small_mnist, tmp_path) -> None:
    others = {name: content[::-1] for name, content in small_mnist.items()}
    put(tmp_path / "data", others, "FashionMNIST/raw")
    assert load_images(root=tmp_path / "data").name == "digits"
    put(tmp_path / "shared disk", small_mnist, "raw")
    (tmp_path / "data" / "MNIST").symlink_to(tmp_path / "shared disk", target_is_directory=True)
    assert load_images(root=tmp_path / "data").name == "MNIST"


def test_packed_content_without_gz_in_its_name_is_read(small_mnist, tmp_path) -> None:
    put(tmp_path, {name: gzip.compress(content) for name, content in small_mnist.items()})
    assert load_images(root=tmp_path).name == "MNIST"


@pytest.mark.parametrize("form", ["as torchvision", "dotted gz"])
@pytest.mark.parametrize("damage", ["changed", "cut", "empty"])
def test_a_damaged_file_is_an_error_that_names_it(small_mnist, tmp_path, form: str, damage: str) -> None:
    files = {}
    for name, content in small_mnist.items():
        path = RENAMED[form](name)
        content = gzip.compress(content) if path.endswith(".gz") else content
        if name == "t10k-images-idx3-ubyte":
            changed = content[:-1] + bytes([content[-1] ^ 1])
            content = {"changed": changed, "cut": content[: len(content) // 2], "empty": b""}[damage]
            bad = path
        files[path] = content
    put(tmp_path, files)
    with pytest.raises(ValueError, match=r"damaged t10k-images-idx3-ubyte.*: delete .*" + bad):
        load_images(root=tmp_path)
    put(tmp_path, {"t10k-images-idx3-ubyte": small_mnist["t10k-images-idx3-ubyte"]}, "raw")
    assert load_images(root=tmp_path).name == "MNIST"  # a right one beside it is taken


def test_only_the_files_with_checksums_are_read(small_mnist, tmp_path) -> None:
    put(tmp_path, small_mnist)
    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):  # torchvision's MNIST class would take these
        torch.save((torch.full((3, 28, 28), 7, dtype=torch.uint8), torch.zeros(3)), processed / name)
    assert load_images(root=tmp_path).train.shape == (30, 784)


def test_auto_falls_back_to_the_digits_and_says_where_it_looked(small_mnist, tmp_path, capsys) -> None:
    assert load_images(root=tmp_path).name == "digits"
    out = capsys.readouterr().out
    assert f"{tmp_path} holds no MNIST, and it could not be downloaded (no server answered): falling back to the" in out
    with pytest.raises(FileNotFoundError, match="root .* holds no MNIST, and it could not be downloaded"):
        load_images("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(small_mnist, tmp_path, capsys) -> None:
    labels = [name for name in small_mnist if "labels" in name]
    put(tmp_path, {name: content for name, content in small_mnist.items() if name not in labels})
    assert load_images(root=tmp_path).name == "digits"
    assert f"MNIST in {tmp_path} lacks {labels[0]}, {labels[1]}, and" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=f"lacks {labels[0]}, {labels[1]}, and"):
        load_images("mnist", tmp_path)


def test_what_is_downloaded_is_kept_where_that_is_possible(small_mnist, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(data, "download_mnist", lambda: small_mnist)
    monkeypatch.setenv("PLANAR_DATA", str(tmp_path))
    assert load_images().name == "MNIST"
    assert sorted(path.name for path in (tmp_path / "MNIST" / "raw").iterdir()) == sorted(small_mnist)
    monkeypatch.setattr(data, "download_mnist", lambda: pytest.fail("downloaded again"))
    assert load_images("mnist").train.shape == (30, 784)
    capsys.readouterr()

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(data, "download_mnist", lambda: small_mnist)
    monkeypatch.setattr(data, "keep_mnist", refuse)
    (tmp_path / "empty").mkdir()
    assert load_images(root=tmp_path / "empty").name == "MNIST"
    assert "cannot be written to (Read-only file system): it is not kept" in capsys.readouterr().out


def test_without_a_root_the_default_folder_may_be_missing(small_mnist, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(data, "folder", lambda kind: tmp_path / "default" / kind)
    for unset in (False, True):
        monkeypatch.delenv("PLANAR_DATA", raising=False) if unset else monkeypatch.setenv("PLANAR_DATA", "")
        assert load_images().name == "digits" and list(tmp_path.iterdir()) == []
    put(tmp_path / "default" / "data", small_mnist)
    assert load_images().name == "MNIST"


@pytest.mark.parametrize("where", ["default dtype", "default device", "autocast", "inference_mode"])
def test_the_pixels_are_the_same_in_any_surroundings(digits: Images, where: str) -> None:
    expected = binarise(digits)
    try:
        torch.set_default_dtype(torch.float64 if where == "default dtype" else torch.float32)
        torch.set_default_device("meta" if where == "default device" else None)
        with torch.autocast("cpu", enabled=where == "autocast"), torch.inference_mode(where == "inference_mode"):
            found = load_images("digits")
            drawn = binarise(found)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(found[:4], digits[:4], strict=True))
    assert torch.equal(drawn.train, expected.train) and torch.equal(drawn.test, expected.test)


def test_the_digits_are_shuffled_and_scaled_as_ever(digits: Images) -> None:
    """Stored numbers and trained models rest on them; a pixel may round another way on another machine."""
    digests = [hashlib.sha256(part.numpy().tobytes()).hexdigest()[:16] for part in digits[1:4:2]]
    assert digests == ["83992a21e82f2944", "a3c463cabcaa7857"]
    assert digits.train.double().mean().item() == pytest.approx(39.6764, abs=2e-3)
    assert digits.test.double().mean().item() == pytest.approx(39.8980, abs=2e-3)


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
    assert (
        torch.equal(x * 255, torch.arange(256.0)) and to_float(torch.zeros(1).byte(), torch.float64).dtype.itemsize == 8
    )
    for wrong, found in ((x, "torch.float32"), ([[0, 255]], "list"), (np.zeros((1, 4), np.uint8), "ndarray")):
        with pytest.raises(TypeError, match=f"images must be a tensor of uint8, got {found}"):
            to_float(wrong)
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.bfloat16, torch.float16, torch.complex64, None, float):
        with pytest.raises(TypeError, match=r"dtype must be torch\.float32 or torch\.float64, got"):
            to_float(torch.zeros(1, 4, dtype=torch.uint8), dtype)


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
    assert torch.equal(binary.train, binarise(images, seed=np.int64(3)).train)
    for wrong in (grey, [grey], grey.numpy(), tuple(images)):
        with pytest.raises(TypeError, match="images must be Images, as load_images returns them, got"):
            binarise(wrong)
    with pytest.raises(TypeError, match=r"images\.test must be a tensor of uint8, got torch\.float32"):
        binarise(images._replace(test=to_float(grey)))
    for seed in (-1, 1.5, None, True, "a", 2**64):
        with pytest.raises(ValueError, match="seed must be an integer"):
            binarise(images, seed=seed)


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


def test_what_is_held_out_is_the_end_of_the_training_images(digits: Images) -> None:
    held = hold_out(digits)
    assert len(held.test) == 1497 // 12 == len(held.test_labels) and "124 of train held out" in held.name
    assert torch.equal(torch.cat([held.train, held.test]), digits.train)
    assert torch.equal(torch.cat([held.train_labels, held.test_labels]), digits.train_labels)
    assert torch.equal(hold_out(digits, 3).test, digits.train[-3:])
    for bad in (0, 1497, -1, 1.5, "all"):
        with pytest.raises(ValueError, match="n must be from 1 to 1496"):
            hold_out(digits, bad)
