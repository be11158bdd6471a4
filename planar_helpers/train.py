"""Training: one loop, its history, and models that are trained once and then loaded."""

import ast
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from planar_helpers.data import REPOSITORY, Images, to_float
from planar_helpers.elbo import ElboTerms
from planar_helpers.planar import check_int
from planar_helpers.run import by_budget, pick_device, seed_all
from planar_helpers.vae import PlanarVAE

RUNS = REPOSITORY / "runs"
SCHEDULES = ("constant", "cosine")


class History(NamedTuple):
    """The four terms' means by epoch, on train and on test: ElboTerms of (epochs,) tensors, in nats per image.

    So `history.test.elbo` and `history.test.kl` are curves. The train means are taken while the epoch runs, one
    draw per image; the test means after it, one draw per image.
    """

    train: ElboTerms
    test: ElboTerms


def fit(
    model: PlanarVAE,
    images: Images,
    epochs: int,
    batch_size: int = 100,
    lr: float = 1e-3,
    weight_decay: float = 1e-5,
    schedule: str = "constant",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Train the model in place by Adam on the loss −mean(ELBO), and return its history.

    The defaults are the post's; weights below 1e-20 are set to 0 after each epoch. schedule "cosine" takes the step
    size from lr to 0 over the run. Two runs from the same weights with the same seed, data and thread count are equal
    bit for bit on a CPU. With `checkpoint`, the state is written there after each epoch, and a run that finds it goes
    on from it, to the same result bit for bit.

    Raises ValueError or TypeError for bad settings or data, or a checkpoint of another run; FloatingPointError if
    the loss stops being finite. Labels are never looked at. Source: the post's settings. Derived in:
    notebooks/07_train_the_vae, section "How is it trained?".
    """
    _check_fit(model, images, epochs, batch_size, lr, schedule, seed)
    if checkpoint is not None and not Path(checkpoint).parent.is_dir():
        raise FileNotFoundError(f"checkpoint must lie in an existing folder, got {str(checkpoint)!r}")
    device = next(model.parameters()).device
    train, test, dtype = images.train.to(device), images.test.to(device), next(model.parameters()).dtype
    steps = epochs * -(-len(train) // batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    settings = {
        **model.settings, "data": _data_version(images), "epochs": epochs, "batch_size": batch_size, "lr": lr,
        "weight_decay": weight_decay, "schedule": schedule, "seed": seed,
    }  # fmt: skip
    seed_all(seed)
    means: dict[str, list[Tensor]] = {"train": [], "test": []}
    start = _resume(checkpoint, settings, model, optimizer, means)
    step = start * steps // epochs

    for epoch in _progress_bar(start, epochs, means, progress):
        model.train()
        seen = []
        for batch in torch.randperm(len(train)).to(device).split(batch_size):
            if schedule == "cosine":
                optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            terms = model.elbo_terms(to_float(train.index_select(0, batch), dtype))
            optimizer.zero_grad()
            terms.loss.backward()
            optimizer.step()
            step += 1
            seen.append(torch.stack(terms).detach())
        means["train"].append(torch.cat(seen, dim=1).double().mean(dim=1).cpu())
        means["test"].append(torch.stack(mean_terms(model, test)).cpu())
        drop_tiny(optimizer)
        if not bool(torch.isfinite(means["train"][-1]).all()):
            raise FloatingPointError(f"the loss is not finite in epoch {epoch + 1}: lower lr (it is {lr})")
        if checkpoint is not None:
            state = {"settings": settings, "means": means, "rng": _rng_state()}
            _save({**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    return History(*(_as_terms(means[part]) for part in ("train", "test")))


@torch.no_grad()
def mean_terms(model: PlanarVAE, images: Tensor, batch_size: int = 2000) -> ElboTerms:
    """Return the four terms' means over images (N, d_x) of bytes, one draw each: an ElboTerms of scalars, in nats."""
    total = torch.zeros(4, dtype=torch.float64, device=images.device)
    dtype = next(model.parameters()).dtype
    for batch in images.split(batch_size):
        total += torch.stack(model.elbo_terms(to_float(batch, dtype))).sum(dim=1)
    return ElboTerms(*(total / max(len(images), 1)))


def train_or_load(
    images: Images,
    epochs: int,
    K: int = 3,
    constraint: str = "shifted",
    D: int = 2,
    hidden: int = 500,
    seed: int = 0,
    progress: bool = True,
    **fit_settings: Any,
) -> tuple[PlanarVAE, History]:
    """Return a trained model and its history: from runs/ if this very run was made before, else by training it.

    The file's name is a hash of all settings, the pixels, and the code that trains (comments and docstrings aside), so
    nothing stale is loaded. Takes `fit`'s settings, too. Prints one line, and leaves the random stream seeded, the same
    either way. An interrupted training goes on where it stopped; of two processes that want the same model one
    trains, one waits.

    Raises as `PlanarVAE` and `fit`, and ValueError for a damaged file under runs/.
    """
    settings = {"K": K, "constraint": constraint, "D": D, "hidden": hidden, "seed": seed, "epochs": epochs}
    check_int("seed", seed, least=0)
    seed_all(seed)
    device = pick_device()
    model = PlanarVAE(d_x=images.train.shape[1], hidden=hidden, D=D, K=K, constraint=constraint).to(device)
    key = {**settings, **fit_settings, "data": _data_version(images)}
    digest = hashlib.sha256((json.dumps(key, sort_keys=True) + _code_version()).encode()).hexdigest()[:10]
    path = RUNS / f"K{K}-{constraint}-{digest}.pt"
    RUNS.mkdir(exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_file():
            saved = _load(path, ("model", "train", "test"), device)
            model.load_state_dict(saved["model"])
            history = History(*(ElboTerms(*saved[part]) for part in ("train", "test")))
        else:
            unfinished = path.with_suffix(".unfinished")
            history = fit(model, images, epochs, seed=seed, checkpoint=unfinished, progress=progress, **fit_settings)
            _save(
                {"model": model.state_dict(), "train": tuple(history.train), "test": tuple(history.test)},
                path,
            )
            unfinished.unlink(missing_ok=True)
    seed_all(seed)  # whatever is drawn next does not depend on whether the model was trained or loaded
    named = f"K = {K}" if K == 0 else f"K = {K}, û {constraint}"
    print(f"{named}: {epochs} epochs on {images.name}, seed {seed}, test ELBO {history.test.elbo[-1]:.2f} nats")
    return model.eval(), history


def epochs_for(images: Images) -> int:
    """Return how many epochs the budget allows: on MNIST the post's 100 (full) or 3 (quick).

    The digits are forty times fewer, so an epoch is forty times shorter: 400 and 100 there.
    """
    mnist = len(images.train) > 10_000
    return by_budget(quick=3, full=100) if mnist else by_budget(quick=100, full=400)


def _check_fit(
    model: PlanarVAE, images: Images, epochs: int, batch_size: int, lr: float, schedule: str, seed: int
) -> None:
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        check_int(name, value, least)
    if not isinstance(lr, int | float) or isinstance(lr, bool) or not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr!r}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    for name in ("train", "test"):
        part = getattr(images, name)
        if not isinstance(part, Tensor) or part.dtype != torch.uint8:
            found = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise TypeError(f"images.{name} must be a tensor of uint8, got {found}")
        if part.dim() != 2 or part.shape[1] != model.d_x or len(part) == 0:
            raise ValueError(f"images.{name} must have shape (N ≥ 1, {model.d_x}), got {tuple(part.shape)}")


@torch.no_grad()
def drop_tiny(optimizer: torch.optim.Optimizer, below: float = 1e-20) -> None:
    """Set weights and Adam's averages smaller than 1e-20 to 0, in place.

    Weight decay takes the weights of pixels that are always black towards 0 without end. Below 1e-38 float32
    numbers are subnormal, which a CPU computes with so slowly that epochs take ever longer (`make bench` shows it for
    the post's loop). Adam's own epsilon, 1e-8, hides the square root of anything that is dropped here.
    """
    for parameter, averages in optimizer.state.items():
        for tensor in (parameter, *averages.values()):
            tensor.masked_fill_(tensor.abs() < below, 0.0)


def _as_terms(means: list[Tensor]) -> ElboTerms:
    return ElboTerms(*torch.stack(means, dim=1))  # (4, epochs)


def _progress_bar(start: int, epochs: int, means: dict[str, list[Tensor]], enabled: bool) -> Iterator[int]:
    """Yield the epochs; show a text bar in a terminal or notebook, and about ten plain lines in a log."""
    live = sys.stderr.isatty() or _in_notebook()
    bar = tqdm(
        range(start, epochs), initial=start, total=epochs, desc="training", unit="epoch", leave=False,
        disable=not (enabled and live),
    )  # fmt: skip
    for epoch in bar:
        yield epoch
        train, test = (_as_terms(means[part][-1:]).elbo.item() for part in ("train", "test"))
        bar.set_postfix_str(f"ELBO train {train:.1f}, test {test:.1f}")
        if enabled and not live and (epoch + 1) % max(epochs // 10, 1) == 0:
            print(
                f"epoch {epoch + 1} of {epochs}: ELBO train {train:.1f}, test {test:.1f} nats",
                file=sys.stderr,
            )


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _resume(checkpoint: str | Path | None, settings: dict, model: PlanarVAE, optimizer: Any, means: dict) -> int:
    """Restore an unfinished run if there is one, and return the epoch to go on from."""
    if checkpoint is None or not Path(checkpoint).is_file():
        return 0
    state = _load(Path(checkpoint), ("settings", "model", "optimizer", "means", "rng"))
    if state["settings"] != settings:
        raise ValueError(f"checkpoint {Path(checkpoint).name} is of another run: {state['settings']}, not {settings}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    means.update(state["means"])
    cpu, *cuda = state["rng"]
    torch.set_rng_state(cpu)
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)
    return len(means["train"])


def _rng_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _save(content: dict, path: str | Path) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as temporary:
        try:
            torch.save(content, temporary)
            temporary.close()
            os.replace(temporary.name, path)
        except BaseException:
            os.unlink(temporary.name)
            raise


def _load(path: Path, keys: tuple[str, ...], device: torch.device | None = None) -> dict:
    """Read what `_save` wrote, or say which file is damaged."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        return {key: content[key] for key in keys}
    except (UnpicklingError, EOFError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} is damaged: delete it and train again") from error


def _data_version(images: Images) -> list:
    """Name and digest of the pixels: two data sets of one name are two."""
    digests = [hashlib.sha256(part.cpu().numpy().tobytes()).hexdigest()[:16] for part in (images.train, images.test)]
    return [images.name, *digests]


# Whole modules, or the functions named.
TRAINS = {"planar": (), "elbo": (), "vae": (), "train": ("fit", "mean_terms", "drop_tiny"), "data": ("to_float",)}


def _code_version() -> str:
    """Hash the code that decides a trained model and its history, without comments and docstrings."""
    digest = hashlib.sha256()
    for module, names in TRAINS.items():
        tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
        if names:
            tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()
