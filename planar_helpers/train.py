"""Training: one loop, its history, and models that are trained once and then loaded."""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from planar_helpers import elbo, planar, vae
from planar_helpers.checkpoint import Checkpoint, Code, Run, pixels_version, run_name
from planar_helpers.data import Images, check_images, check_pixels, to_float
from planar_helpers.elbo import ElboTerms
from planar_helpers.planar import check_int
from planar_helpers.run import by_budget, folder, pick_device, say, seed_all
from planar_helpers.vae import FlowPosterior, PlanarVAE, check_model, evaluating

SCHEDULES = ("constant", "cosine")
P = ParamSpec("P")


class History(NamedTuple):
    """The four terms' means by epoch, on train and on test: ElboTerms of (epochs,) tensors, in nats per image.

    So `history.test.elbo` and `history.test.kl` are curves. The train means are taken while the epoch runs, one
    draw per image; the test means after it, one draw per image.
    """

    train: ElboTerms
    test: ElboTerms


def _undisturbed(loop: Callable[Concatenate[PlanarVAE, P], History]) -> Callable[Concatenate[PlanarVAE, P], History]:
    """Run the loop with gradients, without autocast, whatever is in force; leave the model in the mode it was in."""

    @functools.wraps(loop)
    def undisturbed(model: PlanarVAE, *args: P.args, **kwargs: P.kwargs) -> History:
        _check_model(model)
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            try:
                return loop(model, *args, **kwargs)
            finally:
                vars(model).pop("elbo_terms", None)  # `Watch` was there

    return undisturbed


@_undisturbed
def fit(
    model: PlanarVAE,
    images: Images,
    epochs: int,
    batch_size: int = 100,
    lr: float = 1e-3,
    weight_decay: float = 1e-5,
    schedule: str = "constant",
    clip: float | None = None,
    warmup: int = 0,
    binarise: bool = False,
    seed: int = 0,
    checkpoint: str | Path | Checkpoint | None = None,
    progress: bool = True,
) -> History:
    """Train the model in place by Adam on the loss −mean(ELBO), and return its history.

    The defaults are the post's; weights below 1e-20 are set to 0 after each epoch. schedule "cosine" takes the step
    size from lr to 0 over the run. `clip` bounds the norm of the gradient. During the first `warmup` epochs the loss is
    −mean(log p(x|z) − β kl), β rising from 0 to 1. `binarise` draws the training pixels anew at each step, 1 with
    probability grey: the test images are then to be binary, too (`data.binarise`).

    Two runs from the same weights with the same seed, data and thread count are equal
    bit for bit on a CPU, and a shorter one is the start of a longer one if the step size is constant. With
    `checkpoint`, the state is written there after each epoch, and a run that finds it goes on from it, to the same
    result bit for bit. Autocast, no_grad and inference_mode have no say here.

    Raises ValueError or TypeError for bad settings or data, or a checkpoint of another run; OSError if the checkpoint
    cannot be written; FloatingPointError at the first step that is not finite, which is kept (`checkpoint.Watch` says
    how to repeat it). Labels are never looked at.
    Source: the post's settings. Derived in: notebooks/07_train_the_vae, section "How is it trained?".
    """
    given: dict[str, Any] = {
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "schedule": schedule,
        "clip": clip, "warmup": warmup, "binarise": binarise, "seed": seed,
    }  # fmt: skip
    given = check_fit(given)
    check_images(images, model.d_x)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError("model was made inside torch.inference_mode and cannot be trained: make it outside")
    epochs, batch_size, seed, warmup = (given[name] for name in ("epochs", "batch_size", "seed", "warmup"))
    files = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    settings = {} if checkpoint is None else run_settings(model, images, given)
    device = next(model.parameters()).device
    train, test, dtype = images.train.to(device), images.test.to(device), next(model.parameters()).dtype
    steps = epochs * -(-len(train) // batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    seed_all(seed)
    means: dict[str, list[Tensor]] = {"train": [], "test": []}
    start = files.resume(settings, epochs, model, optimizer, means)
    step = start * steps // epochs

    for epoch in _progress_bar(start, epochs, means, progress):
        model.train()
        seen = []
        for batch in torch.randperm(len(train), device="cpu").to(device).split(batch_size):
            if schedule == "cosine":
                optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            x = to_float(train.index_select(0, batch), dtype)
            terms = model.elbo_terms(torch.bernoulli(x) if binarise else x)
            step += 1
            beta = min(1.0, step * epochs / (warmup * steps)) if warmup else 1.0
            optimizer.zero_grad()
            (terms.loss if beta == 1 else (beta * terms.kl - terms.log_px_z).mean()).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            seen.append(torch.stack(terms).detach())
        means["train"].append(torch.cat(seen, dim=1).double().mean(dim=1).cpu())
        means["test"].append(torch.stack(mean_terms(model, test)).cpu())
        drop_tiny(optimizer)
        _check_finite(means["train"][-1], epoch, lr)
        files.save(settings, model, optimizer, means)
    return _history(means)


@torch.no_grad()
def mean_terms(model: PlanarVAE, images: Tensor, batch_size: int = 2000) -> ElboTerms:
    """Return the four terms' means over images (N, d_x) of bytes, one draw each: an ElboTerms of scalars, in nats.

    The model is measured in eval() mode, and left in the mode it was in. Raises TypeError or ValueError for another
    model or other images; no image has no mean.
    """
    _check_model(model)
    check_pixels("images", images, model.d_x)
    check_int("batch_size", batch_size, least=1)
    total = torch.zeros(4, dtype=torch.float64, device=images.device)
    dtype = next(model.parameters()).dtype
    with evaluating(model):
        for batch in images.split(batch_size):
            total += torch.stack(model.elbo_terms(to_float(batch, dtype))).sum(dim=1)
    return ElboTerms(*(total / len(images)))


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


@torch.inference_mode(False)
def train_or_load(
    images: Images,
    epochs: int,
    K: int = 3,
    constraint: str = "shifted",
    D: int = 2,
    hidden: int | tuple[int, ...] = 500,
    seed: int = 0,
    progress: bool = True,
    family: str = "planar",
    dropout: float = 0.0,
    decoder: PlanarVAE | None = None,
    **fit_settings: Any,
) -> tuple[PlanarVAE, History]:
    """Return a trained model and its history: from runs/ if this very run was made before, else by training it.

    The files' name is a hash of all settings, the dtype, the pixels, and the code that trains (comments and docstrings
    aside), so nothing stale is loaded. Takes `fit`'s settings, too. Prints one line, and leaves the random stream
    seeded, the same either way. A run goes on where it was interrupted, or where a shorter one of a constant step
    ended; on its way it keeps 1, 3, 10, 30, 100, ... epochs. Of two processes that want the same run one trains, one
    waits. A folder that cannot be written to is read; what is not there is trained, and not kept. A disk that fills up
    meanwhile does not stop the training. With `decoder`, a model of the same sizes, its decoder is taken and stays as
    it is: only the encoder is trained, so that two kinds of q can be compared at one p(x).

    Raises as `PlanarVAE` and `fit`, ValueError for a damaged file under runs/, and RuntimeError if the code that
    trains was replaced after it was imported.
    """
    check_images(images)
    unknown = sorted(set(fit_settings) - set(FIT_DEFAULTS))
    if unknown:
        raise TypeError(f"train_or_load has no setting {unknown[0]!r}: those of fit are {', '.join(FIT_DEFAULTS)}")
    epochs, seed, K, D, hidden = map(_plain, (epochs, seed, K, D, hidden))
    fit_settings = check_fit({**FIT_DEFAULTS, **fit_settings, "epochs": epochs, "seed": seed})
    with torch.device("cpu"):  # whatever default device is in force
        seed_all(seed)
        model = PlanarVAE(images.train.shape[1], hidden, D, K, constraint, family, dropout)
    if decoder is not None:
        check_model(decoder)
        sizes = [[one.settings[name] for name in ("d_x", "hidden", "D")] for one in (model, decoder)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"decoder must be a model with d_x, hidden, D = {sizes[0]}, got {sizes[1]}")
        model.decoder.load_state_dict(decoder.decoder.state_dict())
        model.decoder.requires_grad_(False)
    model = model.to(pick_device())
    run = Run(folder("runs"), run_name(run_settings(model, images, fit_settings)), epochs)
    # What is finished is read without the lock: it may lie on a disk that cannot be written to.
    with nullcontext() if run.finished(epochs).is_file() else run.lock():
        history = fit(model, images, checkpoint=run, progress=progress, **fit_settings)
    seed_all(seed)  # whatever is drawn next depends on the seed alone, not on how the model came about
    named = f"{family}, " * (family != "planar") + f"K = {K}" + f", {constraint} u_hat" * (K > 0)
    say(f"{named}: {epochs} epochs on {images.name}, seed {seed}, test ELBO {history.test.elbo[-1]:.2f} nats")
    return model.eval(), history


def epochs_for(images: Images) -> int:
    """Return how many epochs the budget allows: on MNIST the post's 100 (full) or 3 (quick).

    The digits are forty times fewer, so an epoch is forty times shorter: 400 and 100 there.
    """
    return by_budget(quick=3, full=100) if len(images.train) > 10_000 else by_budget(quick=100, full=400)


# What decides a trained model's numbers, and so its files' name. Listed by name: moving one is an error here.
CODE = Code(
    planar._constrain, planar._det, planar.planar_chain,
    elbo.ElboTerms, elbo.bernoulli_log_likelihood, elbo.gaussian_log_density, elbo.standard_normal_log_density,
    FlowPosterior.rsample, FlowPosterior._sheared, FlowPosterior._S, FlowPosterior.without_steps, FlowPosterior.replace,
    PlanarVAE.__init__, PlanarVAE._encode, PlanarVAE.elbo_terms, vae._layers,
    to_float, seed_all, fit, mean_terms, drop_tiny,
    LOG_E_MINUS_1=planar.LOG_E_MINUS_1, LOG_2PI=elbo.LOG_2PI,
)  # fmt: skip
FIT_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(fit).parameters.items()
    if name not in ("model", "images", "epochs", "seed", "checkpoint", "progress")
}


def run_settings(model: PlanarVAE, images: Images, given: dict[str, Any]) -> dict[str, Any]:
    """Return all that decides a run's numbers: equal settings are one run. Raise RuntimeError if code was replaced.

    The epochs belong to it only if the step size depends on them: else a shorter run is the start of a longer one. So
    do the values of parameters that are not trained.
    """
    settings = {
        **model.settings, "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "data": [images.name, *pixels_version(images.train, images.test)], **given, "code": CODE.version(),
    }  # fmt: skip
    if given["schedule"] == "constant":
        del settings["epochs"]
    frozen = [parameter.detach() for parameter in model.parameters() if not parameter.requires_grad]
    if frozen:
        settings["frozen"] = pixels_version(*frozen)
    return settings


def _plain(value: Any) -> Any:
    """Return NumPy's numbers as Python's own."""
    return value.item() if isinstance(value, np.generic) else value


def check_fit(given: dict[str, Any]) -> dict[str, Any]:
    """Raise ValueError for settings that `fit` cannot train with; return them as Python's own numbers."""
    given = {name: _plain(value) for name, value in given.items()}
    for name, least in (("epochs", 1), ("batch_size", 1), ("warmup", 0), ("seed", 0)):
        check_int(name, given[name], least)
    for name, positive in (("lr", True), ("weight_decay", False), ("clip", True)):
        number = given[name]
        real = isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < math.inf
        if (not real or positive and number == 0) and (name, number) != ("clip", None):
            raise ValueError(f"{name} must be {'positive' if positive else 'at least 0'} and finite, got {number!r}")
        given[name] = float(number) if real else None
    if given["schedule"] not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {given['schedule']!r}")
    if not isinstance(given["binarise"], bool):
        raise ValueError(f"binarise must be True or False, got {given['binarise']!r}")
    return given


def _check_model(model: PlanarVAE) -> None:
    check_model(model)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        raise TypeError(f"model must be float32 or float64, got {', '.join(sorted(map(str, dtypes)))}")


def _check_finite(means: Tensor, epoch: int, lr: float) -> None:
    if not bool(torch.isfinite(means).all()):
        raise FloatingPointError(f"the loss is not finite in epoch {epoch + 1}: lower lr (it is {lr})")


def _history(means: dict[str, list[Tensor]]) -> History:
    return History(*(ElboTerms(*torch.stack(means[part], dim=1)) for part in ("train", "test")))


def _progress_bar(start: int, epochs: int, means: dict[str, list[Tensor]], enabled: bool) -> Iterator[int]:
    """Yield the epochs; show a text bar in a terminal or notebook, and about ten plain lines in a log."""
    open_stderr = sys.stderr is not None and not getattr(sys.stderr, "closed", False)  # pythonw has none
    in_notebook = "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")
    live = open_stderr and (sys.stderr.isatty() or in_notebook)
    bar = tqdm(
        range(start, epochs), initial=start, total=epochs, desc="training", unit="epoch", leave=False,
        disable=not (enabled and live and start < epochs),
    )  # fmt: skip
    for epoch in bar:
        yield epoch
        train, test = (ElboTerms(*means[part][-1]).elbo.item() for part in ("train", "test"))
        bar.set_postfix_str(f"ELBO train {train:.1f}, test {test:.1f}")
        if enabled and open_stderr and not live and (epoch + 1) % max(epochs // 10, 1) == 0:
            say(f"epoch {epoch + 1} of {epochs}: ELBO train {train:.1f}, test {test:.1f} nats", sys.stderr)
