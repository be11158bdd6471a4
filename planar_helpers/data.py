"""The images: MNIST through torchvision, or scikit-learn's embedded digits; always bytes, 28 × 28 = 784 a row.

MNIST is looked for in `root`, else in the folder that PLANAR_DATA names, else in data/ at the repository's root.
"""

import contextlib
import hashlib
import os
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.transforms.v2 import functional as transforms

REPOSITORY = Path(__file__).resolve().parent.parent
DOWNLOAD_TIMEOUT = 5.0  # seconds for a first answer, and seconds of silence later on
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class Images(NamedTuple):
    """A data set: train and test are uint8 (N, 784), labels int64 (N,), name says which data it is."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    name: str


def load_images(name: str = "auto", root: str | Path | None = None) -> Images:
    """Load "mnist", "digits", or with "auto" MNIST if it is on disk, else downloaded, else the digits.

    Says in one line which data it took, and when it fell back. "digits" are scikit-learn's 1 797 scans of 8 × 8,
    enlarged to 20 × 20 and padded to 28 × 28: 1 497 to train, 300 to test, after a seeded shuffle.

    Raises ValueError for an unknown name or damaged files, FileNotFoundError for a root that is not there, or for
    "mnist" where it can be neither found nor downloaded.

    >>> images = load_images("digits")
    digits: 1497 training and 300 test images
    >>> images.train.shape, images.train.dtype
    (torch.Size([1497, 784]), torch.uint8)
    """
    if name not in ("auto", "mnist", "digits"):
        raise ValueError(f'name must be "auto", "mnist" or "digits", got {name!r}')
    folder = _data_folder(root)
    if name == "digits":
        return _announce(_load_digits())
    if not _has_mnist(folder):
        try:
            _download_mnist(folder)
        except (OSError, RuntimeError, HTTPException) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if name == "mnist":
                raise FileNotFoundError(
                    f"root {folder} holds no MNIST and it could not be downloaded ({reason}): "
                    "put the four files into its MNIST/raw, or name a folder that has them there in PLANAR_DATA"
                ) from error
            print("MNIST is neither on disk nor to be downloaded: falling back to the embedded digits")
            return _announce(_load_digits())
    return _announce(_load_mnist(folder))


def to_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn bytes 0..255 into grey levels in [0, 1]: the one place where pixels become numbers.

    >>> to_float(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([0., 1.])
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    return images.to(dtype) / 255


def binarise(images: Images, seed: int = 0) -> Images:
    """Return the data set with each pixel drawn once, 255 with probability grey/255, else 0 (seeded).

    The one place where images become binary. Source: Salakhutdinov & Murray 2008.

    >>> data = binarise(Images(*4 * (torch.full((3, 784), 128, dtype=torch.uint8),), name="grey"))
    >>> data.train.unique().tolist(), data.name
    ([0, 255], 'grey, binarised')
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = (
        (torch.rand(part.shape, generator=generator) < to_float(part)).byte() * 255
        for part in (images.train, images.test)
    )
    return images._replace(train=train, test=test, name=f"{images.name}, binarised")


def _announce(images: Images) -> Images:
    print(f"{images.name}: {len(images.train)} training and {len(images.test)} test images")
    return images


def _data_folder(root: str | Path | None) -> Path:
    """Return the folder to look in; only the repository's own data/ may be missing (and be created later)."""
    source = "root"
    if root is None:
        root, source = os.environ.get("PLANAR_DATA") or None, "PLANAR_DATA"
    if root is None:
        return REPOSITORY / "data"
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{source} must name an existing folder, got {str(root)!r}")
    return Path(root)


def _has_mnist(folder: Path) -> bool:
    return all((folder / "MNIST" / "raw" / file).is_file() for file in MNIST_MD5)


def _load_mnist(folder: Path) -> Images:
    for file, md5 in MNIST_MD5.items():
        path = folder / "MNIST" / "raw" / file
        if hashlib.md5(path.read_bytes()).hexdigest() != md5:
            raise ValueError(f"root holds a damaged {file} (its checksum differs): delete {path} and load again")
    # torchvision's readers, not its MNIST class: that would take files of MNIST/processed in place of those checked
    readers = (read_image_file, read_label_file, read_image_file, read_label_file)
    train, train_labels, test, test_labels = (
        read(str(folder / "MNIST" / "raw" / file)) for read, file in zip(readers, MNIST_MD5, strict=True)
    )
    return Images(train.flatten(1), train_labels, test.flatten(1), test_labels, "MNIST")


def _download_mnist(folder: Path) -> None:
    """Download into a temporary folder beside the target, then rename: an interrupted download leaves nothing."""
    _await_an_answer()
    folder.mkdir(exist_ok=True)
    with (
        _socket_timeout(DOWNLOAD_TIMEOUT),
        tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary,
    ):
        MNIST(temporary, train=True, download=True)
        for file in (Path(temporary) / "MNIST" / "raw").glob("*.gz"):
            file.unlink()
        target = folder / "MNIST" / "raw"
        target.mkdir(parents=True, exist_ok=True)
        for file in MNIST_MD5:
            os.replace(Path(temporary) / "MNIST" / "raw" / file, target / file)


def _await_an_answer() -> None:
    """Raise OSError unless a server answers within DOWNLOAD_TIMEOUT, however many addresses and mirrors there are."""
    answered: list[str] = []

    def ask() -> None:
        for mirror in MNIST.mirrors:
            with contextlib.suppress(OSError, HTTPException):
                address = mirror + MNIST.resources[0][0]
                with urllib.request.urlopen(address, timeout=DOWNLOAD_TIMEOUT) as answer:
                    answered.append(answer.read(1).hex())
                return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_TIMEOUT)
    if not answered:
        raise OSError("no server answered" + (f" within {DOWNLOAD_TIMEOUT:g} seconds" if thread.is_alive() else ""))


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _load_digits() -> Images:
    from sklearn.datasets import load_digits  # a slow import, needed only here

    bunch = load_digits()
    scans = torch.from_numpy(bunch.images).float().clamp(0, 16) * (255 / 16)  # (1797, 8, 8), grey levels 0..16
    enlarged = transforms.resize(scans.unsqueeze(1), [20, 20], antialias=True)
    padded = transforms.pad(enlarged, [4, 4, 4, 4]).round().clamp(0, 255).byte().flatten(1)  # (1797, 784)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(padded), generator=torch.Generator().manual_seed(0))
    train, test = order[:1497], order[1497:]
    return Images(padded[train], labels[train], padded[test], labels[test], "digits")
