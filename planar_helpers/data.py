"""The images: MNIST from wherever it lies, or scikit-learn's embedded digits; always bytes, 28 × 28 = 784 a row.

MNIST is looked for in `root`, else in the folder that PLANAR_DATA names, else in data/: in the folder itself, in its
MNIST/raw, raw and MNIST, under the names that torchvision, the original site and archives give the four files,
packed (.gz) or not. What is in a file decides, by its checksum.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from planar_helpers.download import MNIST_MD5, download_mnist, keep_mnist, unpack
from planar_helpers.run import folder, say


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
    place = folder("data") if root is None else Path(root).expanduser()
    if not place.is_dir() and (root is not None or os.environ.get("PLANAR_DATA")):  # data/ itself may be missing
        raise FileNotFoundError(
            f"{'PLANAR_DATA' if root is None else 'root'} must name an existing folder, got {str(place)!r}"
        )
    images = _load_digits() if name == "digits" else _load_mnist(place, or_digits=name == "auto")
    say(f"{images.name}: {len(images.train)} training and {len(images.test)} test images")
    return images


def to_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn bytes 0..255 into grey levels in [0, 1]: the one place where pixels become numbers.

    Raises TypeError unless the images are a tensor of uint8, and the dtype is float32 or float64.

    >>> to_float(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([0., 1.])
    """
    _check_bytes("images", images)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    return images.to(dtype) / 255


def binarise(images: Images, seed: int = 0) -> Images:
    """Return the data set with each pixel drawn once, 255 with probability grey/255, else 0 (seeded).

    The one place where images become binary. Raises TypeError unless these are Images, ValueError for a bad seed.
    Source: Salakhutdinov & Murray 2008.

    >>> data = binarise(Images(*4 * (torch.full((3, 784), 128, dtype=torch.uint8),), name="grey"))
    >>> data.train.unique().tolist(), data.name
    ([0, 255], 'grey, binarised')
    """
    check_images(images)
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, got {seed!r}")
    generator = torch.Generator("cpu").manual_seed(int(seed))
    train, test = (
        (torch.rand(part.shape, generator=generator, dtype=torch.float32, device="cpu") < to_float(part.cpu())).byte()
        * 255
        for part in (images.train, images.test)
    )
    return images._replace(train=train, test=test, name=f"{images.name}, binarised")


def hold_out(images: Images, n: int | None = None) -> Images:
    """Return the data set with its last n training images in the test set's place, to choose settings on.

    The test images are not in it, so what is chosen cannot have seen them. By default n is a twelfth, 5 000 of MNIST's.
    Raises ValueError unless 1 ≤ n < N.
    """
    check_images(images)
    n = len(images.train) // 12 if n is None else n
    if not isinstance(n, int) or not 1 <= n < len(images.train):
        raise ValueError(f"n must be from 1 to {len(images.train) - 1}, fewer than the training images, got {n!r}")
    train, labels = images.train, images.train_labels
    return Images(train[:-n], labels[:-n], train[-n:], labels[-n:], f"{images.name}, {n} of train held out")


def check_images(images: Images, d_x: int | None = None) -> None:
    """Raise TypeError or ValueError unless these are Images, with rows of d_x bytes (of any number without d_x)."""
    if not isinstance(images, Images):
        raise TypeError(f"images must be Images, as load_images returns them, got {type(images).__name__}")
    for name in ("train", "test"):
        check_pixels(f"images.{name}", getattr(images, name), d_x)


def check_pixels(name: str, pixels: Tensor, d_x: int | None) -> None:
    """Raise TypeError or ValueError unless the pixels are bytes, at least one row of d_x."""
    _check_bytes(name, pixels)
    if pixels.dim() != 2 or pixels.shape[1] != (d_x or pixels.shape[1]) or len(pixels) < 1:
        raise ValueError(f"{name} must have shape (N ≥ 1, {d_x or 'd_x'}), got {tuple(pixels.shape)}")


def _check_bytes(name: str, pixels: Tensor) -> None:
    if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8:
        found = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(f"{name} must be a tensor of uint8, got {found}")


def _load_mnist(place: Path, or_digits: bool) -> Images:
    """Return MNIST from the folder, else downloaded, else an error or the digits."""
    found = _find_mnist(place)
    missing = [name for name, paths in found.items() if not paths]
    if not missing:
        return _as_images({name: _read(name, paths) for name, paths in found.items()})
    lacking = f"{place} holds no MNIST" if len(missing) == 4 else f"MNIST in {place} lacks {', '.join(missing)}"
    try:
        contents = download_mnist()
    except OSError as error:
        lacking = f"{lacking}, and it could not be downloaded ({error})"
        if not or_digits:
            raise FileNotFoundError(
                f"root {lacking}: put the four files there, packed or not, or name a folder of them in PLANAR_DATA"
            ) from error
        say(f"{lacking}: falling back to the embedded digits")
        return _load_digits()
    try:
        keep_mnist(place, contents)
    except OSError as error:
        say(f"MNIST was downloaded, but {place} cannot be written to ({error.strerror or error}): it is not kept")
    return _as_images(contents)


def _find_mnist(place: Path) -> dict[str, list[Path]]:
    """Return all files that bear one of the four names, by that name: here, in MNIST, raw, or a folder of its own."""
    found: dict[str, list[Path]] = {name: [] for name in MNIST_MD5}
    for folder_name, below, files in os.walk(place, followlinks=True):
        below[:] = sorted(name for name in below if _plain_name(name) in ("mnist", "raw", *MNIST_MD5))
        for file in sorted(files):
            if _plain_name(file) in found:
                found[_plain_name(file)].append(Path(folder_name, file))
    return found


def _plain_name(name: str) -> str:
    """Return the name as torchvision spells it: train-images.idx3-ubyte.gz is train-images-idx3-ubyte."""
    return name.lower().removesuffix(".gz").replace(".", "-").replace("_", "-")


def _read(name: str, paths: list[Path]) -> bytes:
    """Return the unpacked content of the first file with the right checksum."""
    for path in paths:
        with suppress(ValueError):
            return unpack(name, path.read_bytes())
    raise ValueError(f"root holds a damaged {name}, or another data set's (its checksum differs): delete {paths[0]}")


def _as_images(contents: dict[str, bytes]) -> Images:
    """Read the four IDX files: their headers have 16 bytes before the images, and 8 before the labels."""
    train, train_labels, test, test_labels = (
        torch.from_numpy(np.frombuffer(contents[name], np.uint8).copy()) for name in MNIST_MD5
    )
    return Images(
        train[16:].view(-1, 784), train_labels[8:].long(), test[16:].view(-1, 784), test_labels[8:].long(), "MNIST"
    )


@torch.inference_mode(False)
def _load_digits() -> Images:
    from sklearn.datasets import load_digits  # a slow import, needed only here

    bunch = load_digits()
    scans = torch.from_numpy(bunch.images).float().clamp(0, 16) * (255 / 16)  # (1797, 8, 8), grey levels 0..16
    with torch.autocast("cpu", enabled=False):  # whatever is in force
        enlarged = F.interpolate(scans.unsqueeze(1), (20, 20), mode="bilinear", antialias=True)
    padded = F.pad(enlarged, (4, 4, 4, 4)).round().clamp(0, 255).byte().flatten(1)  # (1797, 784)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(padded), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    train, test = order[:1497], order[1497:]
    return Images(padded[train], labels[train], padded[test], labels[test], "digits")
