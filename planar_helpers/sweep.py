"""Experiments: runs that differ in their settings, each trained and measured once and kept as one JSON.

Every run holds out a twelfth of the training images, MNIST's last 5 000: settings are chosen on those. The test images
are looked at only by `measure`, for runs whose settings are chosen.
"""

import functools
import json
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

import joblib
import torch
from sklearn.model_selection import ParameterGrid
from torch import Tensor
from tqdm import tqdm

from planar_helpers.data import Images, binarise, hold_out, load_images, to_float
from planar_helpers.evaluate import importance_log_px, inference_gap, own_posterior
from planar_helpers.quadrature import exact_log_px, main_island, measuring, repeatable
from planar_helpers.run import folder, replacing
from planar_helpers.train import CODE, FIT_DEFAULTS, History, check_fit, train_or_load
from planar_helpers.vae import PlanarVAE

Settings = dict[str, Any]
DEFAULTS: Settings = {
    "data": "mnist", "family": "planar", "K": 3, "constraint": "shifted", "D": 2, "hidden": 500, "dropout": 0.0,
    "epochs": 100, **FIT_DEFAULTS, "decoder": None, "seed": 0,
}  # fmt: skip
# draws of the ELBO, an image; images with parameters of their own; training images; importance samples where D ≠ 2
DRAWS, OWN, SOME, SAMPLES = 50, 200, 2000, 2000


def combinations(lists: dict[str, list[Any]]) -> list[Settings]:
    """Return the settings of every combination of the values listed; what is not named has its default.

    The seeds are outermost: a sweep that is stopped half-way has as many of them for each arm, give or take one.
    Raises ValueError or TypeError for settings that no run can have.
    """
    found = []
    for settings in ParameterGrid({name: lists.get(name, [default]) for name, default in DEFAULTS.items()}):
        if settings["data"] not in ("mnist", "digits", "auto"):
            raise ValueError(f"data must be mnist, digits or auto, got {settings['data']!r}")
        model = PlanarVAE(1, *(settings[name] for name in ("hidden", "D", "K", "constraint", "family", "dropout")))
        fit_settings = check_fit({name: settings[name] for name in ("epochs", "seed", *FIT_DEFAULTS)})
        found.append({name: {**settings, **model.settings, **fit_settings}[name] for name in DEFAULTS})
        if settings["decoder"] is not None:
            found[-1]["decoder"] = str(settings["decoder"]).replace("{seed}", str(settings["seed"]))
            if not _path(found[-1]["decoder"]).is_file():
                raise ValueError(f"decoder must name a run that is made, without .json, got {found[-1]['decoder']!r}")
    return sorted(found, key=lambda settings: settings["seed"])


def path_of(settings: Settings) -> Path:
    """Return where the run's JSON belongs: named by the settings that are not the defaults, under results/runs/."""
    unusual = {name: value for name, value in settings.items() if value != DEFAULTS[name] or name in ("K", "seed")}
    return _path("-".join(f"{k}={'x'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in unusual.items()))


def _path(name: str) -> Path:
    return folder("results") / "runs" / f"{name}.json"


def read(path: Path) -> dict[str, Any]:
    """Return what a run's JSON holds. Raises ValueError if it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: delete it, and the run is made again") from error


def is_done(settings: Settings, on_test: bool) -> bool:
    """Whether the run's JSON is there, measured on the test images if that is asked for."""
    found = read(path) if (path := path_of(settings)).is_file() else {}
    return "failed" in found or ("results" in found if on_test else "history" in found)


def measured(folder: Path | str, **wanted: Any) -> list[dict[str, Any]]:
    """Return what the JSONs in `folder` hold of runs with these settings, measured on the test images, by name."""
    wanted = json.loads(json.dumps(wanted))  # a tuple as a list, as in the files
    return [
        one
        for one in map(read, sorted(Path(folder).glob("*.json")))
        if "results" in one and all(one["settings"][name] == value for name, value in wanted.items())
    ]


def run(settings: Settings, on_test: bool = False, progress: bool = False) -> Path:
    """Train, and with `on_test` measure, one run on one thread; write its JSON, whole or not at all, and return where.

    What is done already is not done again: a training goes on from its last epoch, a JSON stays. A run whose loss
    stops being finite is kept, too: it says "failed" in place of a history.
    """
    path, threads = path_of(settings), torch.get_num_threads()
    if is_done(settings, on_test):
        return path
    torch.set_num_threads(1)  # so that a run's numbers do not depend on how many run beside it
    try:
        images = _images(settings["data"], settings["binarise"])
        content: dict[str, Any] = {
            "settings": settings, "data": images.name, "code": CODE.version(), "torch": str(torch.__version__),
            "python": platform.python_version(), "machine": platform.platform(),
        }  # fmt: skip
        try:
            model, history = trained(settings, progress)
        except FloatingPointError as error:
            content["failed"] = str(error)
        else:
            content["history"] = {
                part: {name: [round(v, 4) for v in values.tolist()] for name, values in terms._asdict().items()}
                for part, terms in (("train", history.train), ("held out", history.test))
            }
            if on_test:
                content["results"] = measure(model.cpu(), images)
        with replacing(path) as temporary:
            lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
            temporary.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8", newline="\n")
    finally:
        torch.set_num_threads(threads)
    return path


def trained(settings: Settings, progress: bool = False) -> tuple[PlanarVAE, History]:
    """Return the run's model and history: loaded if its weights are under runs/, else trained."""
    chosen = {name: value for name, value in settings.items() if name != "data"}
    if settings["decoder"] is not None:
        chosen["decoder"] = trained({**DEFAULTS, **read(_path(settings["decoder"]))["settings"]}, progress)[0]
    return train_or_load(_images(settings["data"], settings["binarise"], held_out=True), progress=progress, **chosen)


def sweep(runs: list[Settings], on_test: bool = False, jobs: int = -1, scheduler: str | None = None) -> list[Path]:
    """Make all runs that are not done yet, `jobs` at a time (−1: one a core), one thread each; return their paths.

    With the address of a Dask scheduler the runs go to its workers, which must see the same folders. A sweep that was
    killed goes on where it was: the same call again. Its processes end within a second of it.
    """
    todo = [settings for settings in runs if not is_done(settings, on_test)]
    with (
        joblib.parallel_config("dask", scheduler_host=scheduler)  # needs the extra [cluster]
        if scheduler is not None
        else joblib.parallel_config(
            "loky", n_jobs=jobs, inner_max_num_threads=1, initializer=_end_with, initargs=(os.getpid(),)
        )
    ):
        tasks = joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="all")(
            joblib.delayed(run)(settings, on_test) for settings in todo
        )
        for path in tqdm(tasks, total=len(todo), unit="run", disable=not todo):
            tqdm.write(path.stem)
    return [path_of(settings) for settings in runs]


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: killed, it can tell nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def measure(model: PlanarVAE, images: Images) -> dict[str, dict[str, Any]]:
    """Return what is to be known of a trained model, on all test images and on the first 2 000 training images.

    For D = 2: the ELBO (mean of 50 draws), exact log p(x) and the gap, each as [mean, standard error over the images];
    the gap's median and deciles, and the share of it that the worst 5 % of the images have; on the first 200 test
    images the approximation gap, from an ascent with the better of two starts. For other D, on the first 1 000 images
    of each, see `_importance`.
    """
    parts = {"test": to_float(images.test), "train": to_float(images.train[:SOME])}
    found = {
        part: _plane(model, x) if model.D == 2 else _importance(model, x[:1000], own=part == "test")
        for part, x in parts.items()
    }
    if model.D == 2:
        x = parts["test"][:OWN]
        found["test"]["approximation"] = _mean(inference_gap(model, x, start=main_island(model, x)).approximation)
        found["test"]["images of the approximation"] = OWN
    return found


def _plane(model: PlanarVAE, x: Tensor) -> dict[str, Any]:
    with measuring(model), repeatable(x, seed=0):
        elbo = model.elbo_draws(x, model.encode(x), DRAWS).mean(dim=0)
    log_px, error = exact_log_px(model, x)
    gap = log_px - elbo
    return {
        "images": len(x), "ELBO": _mean(elbo), "log p(x)": _mean(log_px), "gap": _mean(gap),
        "deciles of the gap": gap.quantile(torch.linspace(0, 1, 11)).tolist(),
        "share of the worst 5 %": (gap.topk(-(-len(gap) // 20)).values.sum() / gap.sum()).item(),
        "largest error of log p(x)": error.max().item(),
    }  # fmt: skip


def _importance(model: PlanarVAE, x: Tensor, own: bool) -> dict[str, Any]:
    """The ELBO and importance-sampled log p(x), with the encoder's q and with each image's own, ascended from there."""
    with measuring(model), repeatable(x, seed=0):
        found, encoded = dict[str, Any](images=len(x), samples=SAMPLES), model.encode(x)
        for name, q in {"encoder": encoded, **({"own": own_posterior(model, x, encoded)} if own else {})}.items():
            elbo, estimate = model.elbo_draws(x, q, DRAWS).mean(dim=0), importance_log_px(model, x, SAMPLES, q)
            found |= {
                f"{name}: ELBO": _mean(elbo), f"{name}: log p(x)": _mean(estimate.log_px),
                f"{name}: error of an image": estimate.error.mean().item(),
            }  # fmt: skip
        return found


def _mean(values: Tensor) -> list[float]:
    """The mean over the images, and its standard error."""
    return [values.mean().item(), values.std().item() / len(values) ** 0.5]


@functools.cache
def _images(name: str, binary: bool, held_out: bool = False) -> Images:
    """The data set; with its last training images as test if they are held out; binary test images, drawn once."""
    images = hold_out(load_images(name)) if held_out else load_images(name)
    return images._replace(test=binarise(images).test, name=f"{images.name}, binarised") if binary else images
