"""`make bench`: speed, compared in one run as ratios. Absolute seconds are noise on a shared machine.

pytest-benchmark times the cases below. Those of a group take turns: each is timed for some rounds, then the next one,
and all of them again. A ratio is one of shortest rounds in a turn, so that both sides saw the same phase of the
machine; the table in figures/bench.md gives its median over the turns, and its range. One thread; compiled before the
clock starts.

    pytest tests/bench.py --benchmark-json=build/bench.json && python tests/bench.py build/bench.json
"""

import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import VisionDataset

from planar_helpers import sweep
from planar_helpers.data import load_images, to_float
from planar_helpers.elbo import LOG_2PI, ElboTerms
from planar_helpers.planar import PlanarFlow, planar_chain, planar_inverse
from planar_helpers.quadrature import exact_log_px
from planar_helpers.run import replacing
from planar_helpers.train import fit
from planar_helpers.vae import PlanarVAE

RESULTS = Path(__file__).resolve().parent.parent / "figures" / "results"
TURNS = {"exact": 2, "step": 5, "epoch": 2, "nine": 1, "chain": 5, "inverse": 5}  # in this order
SHAPES = ((100, 3, 2), (100, 16, 2), (1000, 16, 2), (100, 80, 40))  # B, K, D
EPOCHS = 4
Task = Callable[[], object]
Push = tuple[Callable[[Tensor], tuple[Tensor, Tensor]], list[Tensor]]  # a flow, and its parameters
CASES: dict[str, dict[str, tuple[Callable[[], Task], int]]] = {group: {} for group in TURNS}  # what sets up, rounds
BESIDE: dict[str, list[float]] = {"memory": [], "slower": []}  # what is measured beside the time, at each call
images = functools.cache(load_images)


def case(group: str, name: str, rounds: int = 50) -> Callable[[Callable[[], Task]], Callable[[], Task]]:
    """Register what sets a case up."""

    def register(setup: Callable[[], Task]) -> Callable[[], Task]:
        CASES[group][name] = setup, rounds
        return setup

    return register


# --- exact log p(x): first, since it also measures how much memory the process ever held ------------------------------


def peak() -> float:
    """The most memory that the process ever held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


@case("exact", "exact log p(x)", rounds=1)
def exact() -> Task:
    model, weights = PlanarVAE(), np.load(RESULTS / "models" / "K=3-lr=0.002-schedule=cosine-seed=0.npz")
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    x = to_float(images().test)

    def task() -> None:
        before = peak()
        exact_log_px(model, x)
        BESIDE["memory"].append(peak() - before)

    return task


@case("exact", "products of a 201² grid", rounds=1)
def grid_products() -> Task:
    x, first, last = to_float(images().test), torch.randn(500, 2), torch.randn(784, 500)
    z = torch.randn(201**2, 2)

    def task() -> None:
        for part in z.split(5000):  # all at once would take gigabytes
            F.linear(F.linear(part, first), last) @ x.T

    return task


# --- a training step, against the eleven forward and backward products of its linear layers, in nn.Linear's layouts ---


@case("step", "products")
def products() -> Task:
    layers = []
    for inputs, outputs, first in ((784, 500, True), (500, 19, False), (2, 500, False), (500, 784, False)):
        layers.append((torch.randn(outputs, inputs), torch.randn(100, inputs), torch.randn(100, outputs), first))

    def task() -> None:
        for weight, x, slope, first in layers:
            F.linear(x, weight)
            slope.T @ x
            if not first:  # no gradient is wanted for the pixels
                slope @ weight

    return task


def stepper(K: int, compiled: bool) -> Task:
    model = PlanarVAE(K=K, constraint="paper")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5, fused=True)
    pixels = images().train
    batches = itertools.cycle(torch.randperm(len(pixels)).split(100)[:-1])  # all of one size
    terms_of = torch.compile(model.elbo_terms, dynamic=False) if compiled else model.elbo_terms

    def task() -> None:  # as in `fit`
        terms = terms_of(to_float(pixels.index_select(0, next(batches))))
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()

    return task


for K, compiled in itertools.product((0, 3, 16, 64), (False, True)):
    name = f"K = {K}" + ", compiled" * compiled
    CASES["step"][name] = functools.partial(stepper, K, compiled), 50


# --- epochs, against the post's own loop ------------------------------------------------------------------------------


class PilImages(VisionDataset):
    """Serve images as torchvision.datasets.MNIST does: an array, a PIL image, then the transform; and the label."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__(root="", transform=transforms.Compose([transforms.ToTensor()]))
        self.data, self.targets = pixels.view(-1, 28, 28), labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.data[index].numpy())), int(self.targets[index])


class PlainVAE(nn.Module):
    """The post's architecture and operations (indexing, bmm, epsilons, probabilities), with the steps chained."""

    def __init__(self, hidden: int = 500, D: int = 2, K: int = 3) -> None:
        super().__init__()
        self.D, self.K = D, K
        self.hidden = nn.Linear(784, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, size) for size in (D, D, D * K, D * K, K))
        self.out = nn.Sequential(nn.Linear(D, hidden), nn.ReLU(), nn.Linear(hidden, 784), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, 784)
        h = F.relu(self.hidden(x))
        mu, logvar, w, u, b = (head(h) for head in self.heads)
        w, u, b = w.view(-1, self.K, 1, self.D), u.view(-1, self.K, self.D, 1), b.view(-1, self.K, 1, 1)
        z0 = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        z, sum_ladj = z0.unsqueeze(2), torch.zeros(len(x), 1)
        for k in range(self.K):
            w_k, u_k, b_k = w[:, k], u[:, k], b[:, k]
            s = torch.bmm(w_k, u_k)
            u_hat = u_k + (-1 + F.softplus(s) - s) * w_k.transpose(2, 1) / w_k.norm(dim=2, keepdim=True) ** 2
            a = torch.bmm(w_k, z) + b_k
            z = z + u_hat * torch.tanh(a)
            h_prime = 1 - torch.tanh(a) ** 2
            sum_ladj += (1 + torch.bmm(h_prime * w_k, u_hat)).abs().add(1e-8).log().squeeze(2)
        z0, zK = z0.unsqueeze(1), z.transpose(2, 1)
        scaled = (z0 - mu.unsqueeze(1)).add(1e-8) / (2 * torch.exp(logvar)).unsqueeze(1)
        square = torch.bmm(scaled, (z0 - mu.unsqueeze(1)).transpose(2, 1)).squeeze(2)
        log_q0 = -LOG_2PI - 0.5 * logvar.add(1e-8).sum(dim=1, keepdim=True) - square
        log_pz = -LOG_2PI - 0.5 * torch.bmm(zK, zK.transpose(2, 1)).squeeze(2).add(1e-8)
        log_px_z = -F.binary_cross_entropy(self.out(zK.squeeze(1)), x, reduction="sum") / len(x)
        return (log_q0 - sum_ladj - log_pz).mean() - log_px_z


@case("epoch", "the post's loop", rounds=1)
def post_epochs() -> Task:
    loader = DataLoader(PilImages(*images()[:2]), batch_size=100, shuffle=True)

    def task() -> None:
        model, marks, total = PlainVAE(), [time.perf_counter()], 0.0
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
        for _ in range(EPOCHS):
            for x, _ in loader:
                loss = model(x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item()  # as the series' earlier posts add it up
            marks.append(time.perf_counter())
        BESIDE["slower"].append((marks[-1] - marks[-2]) / (marks[1] - marks[0]))

    return task


@case("epoch", "fit", rounds=1)
def our_epochs() -> Task:
    one_test_image = images()._replace(test=images().test[:1])  # the post's loop measures none
    return lambda: fit(PlanarVAE(constraint="paper"), one_test_image, epochs=EPOCHS, progress=False)


# --- nine trainings ---------------------------------------------------------------------------------------------------


def nine() -> list[sweep.Settings]:
    return sweep.combinations(
        {"K": [0, 3, 16], "seed": [0, 1, 2], "epochs": [2], "schedule": ["cosine"], "data": ["auto"]}
    )


@case("nine", "one after the other", rounds=1)
def in_turn() -> Task:
    def task() -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        for settings in nine():
            sweep.trained(settings)

    return task


@case("nine", "sweep", rounds=1)
def spread() -> Task:
    return lambda: sweep.sweep(nine())


# --- the chain, against other libraries: the same map, paper's û, parameters shared by the points ---------------------


def chain(whose: str, B: int, K: int, D: int) -> Task:
    flow, z0 = PlanarFlow(D, K, "paper"), torch.randn(B, D, requires_grad=True)
    push, parameters = {"ours": ours, "compiled": compiled_ours, "Pyro": pyros, "normflows": normflows}[whose](flow)
    torch.testing.assert_close(push(z0), flow(z0), rtol=1e-3, atol=1e-3)

    def task() -> None:
        zK, sum_ladj = push(z0.clone())  # Pyro would know z0 again, and answer from its cache
        torch.autograd.grad(zK.sum() + sum_ladj.sum(), [z0, *parameters])

    return task


def ours(flow: PlanarFlow) -> Push:
    return flow, list(flow.parameters())


def compiled_ours(flow: PlanarFlow) -> Push:
    return torch.compile(flow, dynamic=False), list(flow.parameters())


def pyros(flow: PlanarFlow) -> Push:
    from pyro.distributions.transforms import Planar  # an extra, needed only here

    steps = nn.ModuleList(Planar(flow.w.shape[1]) for _ in flow.w)
    for step, w, u, b in zip(steps, flow.w, flow.u, flow.b, strict=True):
        step.w.data, step.u.data, step.bias.data = w.detach().clone(), u.detach().clone(), b.detach().clone().view(1)

    def push(z: Tensor) -> tuple[Tensor, Tensor]:
        sum_ladj = torch.zeros(len(z))
        for step in steps:
            z_next = step(z)
            sum_ladj, z = sum_ladj + step.log_abs_det_jacobian(z, z_next), z_next
        return z, sum_ladj

    return push, list(steps.parameters())


def normflows(flow: PlanarFlow) -> Push:
    from normflows.flows import Planar  # an extra, needed only here

    each = zip(*(tensor.detach().clone().split(1) for tensor in (flow.w, flow.u, flow.b)), strict=True)
    steps = nn.ModuleList(Planar((flow.w.shape[1],), w=w, u=u, b=b) for w, u, b in each)

    def push(z: Tensor) -> tuple[Tensor, Tensor]:
        sum_ladj = torch.zeros(len(z))
        for step in steps:
            z, ladj = step(z)
            sum_ladj = sum_ladj + ladj
        return z, sum_ladj

    return push, list(steps.parameters())


for shape, whose in itertools.product(SHAPES, ("ours", "compiled", "Pyro", "normflows")):
    CASES["chain"][f"{shape}, {whose}"] = functools.partial(chain, whose, *shape), 30


@case("inverse", "chain")
def pushed() -> Task:
    return per_point(lambda z, w, u, b: sum(part.sum() for part in planar_chain(z, w, u, b)))


@case("inverse", "inverse")
def inverted() -> Task:
    return per_point(lambda z, w, u, b: planar_inverse(z, w, u, b).sum())


def per_point(total: Callable[..., Tensor]) -> Task:
    """Set up 256 points, each with 32 steps of its own, as an encoder emits them."""
    inputs = [torch.randn(256, *size, requires_grad=True) for size in ((2,), (32, 2), (32, 2), (32,))]
    return lambda: torch.autograd.grad(total(*inputs), inputs)


# --- timed ------------------------------------------------------------------------------------------------------------


@functools.cache
def no_compiler() -> str:
    """Return why nothing can be compiled here, in one line; empty if it can."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(9))
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return ""


@functools.cache
def ready(group: str, name: str) -> Task:
    """Set a case up, once for all its turns."""
    torch.manual_seed(0)
    return CASES[group][name][0]()


@pytest.mark.parametrize(
    ("group", "turn", "name"), [(g, turn, name) for g, n in TURNS.items() for turn in range(n) for name in CASES[g]]
)
def test_speed(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, group: str, turn: int, name: str
) -> None:
    """Time one turn of one case."""
    if "compiled" in name and no_compiler():
        pytest.skip(no_compiler())
    monkeypatch.setenv("PLANAR_RESULTS", str(tmp_path))  # a sweep starts with nothing done
    torch.set_num_threads(1)
    rounds = CASES[group][name][1]
    benchmark.pedantic(ready(group, name), rounds=rounds, warmup_rounds=5 if rounds > 1 else 0)
    benchmark.extra_info.update(group=group, case=name, turn=turn, beside=BESIDE)


# --- the table --------------------------------------------------------------------------------------------------------

ROWS = [  # what, group, numerator, denominator, goal
    ("step, K = 3, against its matrix products", "step", "K = 3", "products", "≤ 1.5"),
    ("the same, compiled", "step", "K = 3, compiled", "products", "≤ 1.3"),
    *((f"step, K = {K}, against K = 0", "step", f"K = {K}", "K = 0", "") for K in (3, 16, 64)),
    *((f"step, K = {K}, against K = 0, compiled", "step", f"K = {K}, compiled", "K = 0, compiled", f"≤ {goal}")
      for K, goal in ((3, 1.1), (16, 1.3), (64, 2.0))),
    (f"{EPOCHS} epochs: the post's own loop against `fit`", "epoch", "the post's loop", "fit", "≥ 3"),
    ("nine trainings: one after the other on all threads, against `sweep`", "nine", "one after the other", "sweep",
     "≥ 1.6"),
    *((f"chain {shape}: {other} against {name}", "chain", f"{shape}, {other}", f"{shape}, {one}", goal)
      for shape in SHAPES for other in ("Pyro", "normflows")
      for one, name, goal in (("ours", "`planar_chain`", "> 1"), ("compiled", "it compiled", "≥ 4"))),
    ("chain (256, 32, 2): `planar_inverse` against `planar_chain`", "inverse", "inverse", "chain", "≤ 3"),
    ("exact log p(x), all test images, against a 201² grid's products", "exact", "exact log p(x)",
     "products of a 201² grid", "≤ 3"),
]  # fmt: skip


def line(what: str, values: list[float], goal: str) -> str:
    """One row: the median, the range, the goal, and whether it is met."""
    if not values:
        return f"| {what} | not measured | | {goal} | |"
    value, (sign, _, bound) = statistics.median(values), goal.partition(" ")
    met = {"≤": float.__le__, "≥": float.__ge__, ">": float.__gt__, "": lambda *_: True}[sign](value, float(bound or 0))
    verdict = ("met" if met else "missed") if goal else ""
    return f"| {what} | {value:.2f} | {min(values):.2f} to {max(values):.2f} | {goal} | {verdict} |"


def epochs_until(runs: Path, bound: float = -147.0) -> dict[str, list[float]]:
    """By schedule: the first epoch, for each seed, with which a three-epoch mean of the held-out ELBO passes the bound.

    Of the runs of K = 3 whose settings are the defaults, but for the schedule, step size and epochs. inf: never.
    """
    free = ("schedule", "lr", "epochs", "seed")
    found: dict[str, list[float]] = {}
    for path in sorted(runs.glob("K=3-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        settings = run["settings"]
        if "history" in run and all(
            settings[name] == default for name, default in sweep.DEFAULTS.items() if name not in free
        ):
            terms = run["history"]["held out"]
            elbo = ElboTerms(*(torch.tensor(terms[name]) for name in ElboTerms._fields)).elbo
            passed = (elbo.unfold(0, 3, 1).mean(dim=1) > bound).nonzero()
            name = f"{settings['schedule']} step size {settings['lr']:g}"
            name += f" over {settings['epochs']} epochs" * (settings["schedule"] != "constant")
            found.setdefault(name, []).append(passed[0].item() + 3 if len(passed) else math.inf)
    return found


def schedules(runs: Path) -> str:
    """The row on schedules: the post's against the cosine of the lowest median; each of at least three seeds."""
    medians = {name: statistics.median(found) for name, found in epochs_until(runs).items() if len(found) >= 3}
    post = "constant step size 0.001"
    best = min((name for name in medians if name.startswith("cosine")), key=medians.__getitem__, default="cosine")
    epochs = [medians.get(name, math.nan) for name in (post, best)]
    said = ["too few runs" if math.isnan(number) else f"{number:g}" for number in epochs]
    what = f"epochs to a held-out ELBO of −147, K = 3: {post} ({said[0]}) against {best} ({said[1]})"
    return line(what, [epochs[0] / epochs[1]] if all(map(math.isfinite, epochs)) else [], "≥ 3")


def table(timed: dict[str, Any], runs: Path = RESULTS / "runs") -> str:
    """The Markdown that figures/bench.md holds, from pytest-benchmark's JSON."""
    shortest: dict[tuple[str, str], dict[int, float]] = {}
    beside: dict[str, list[float]] = {}
    for one in timed["benchmarks"]:
        info = one["extra_info"]
        shortest.setdefault((info["group"], info["case"]), {})[info["turn"]] = one["stats"]["min"]
        beside = info["beside"]  # the last has all
    lines = []
    for what, group, over, under, goal in ROWS:
        sides = [shortest.get((group, name), {}) for name in (over, under)]
        lines.append(line(what, [sides[0][turn] / sides[1][turn] for turn in sides[0].keys() & sides[1].keys()], goal))
    lines.append(
        line("memory of exact log p(x), in GiB", [max(beside["memory"])] if beside.get("memory") else [], "≤ 1")
    )
    lines.append(line(f"the post's loop: its epoch {EPOCHS} against its first", beside.get("slower", []), ""))
    lines.append(schedules(runs))
    cpu = timed["machine_info"].get("cpu", {}).get("brand_raw", platform.machine())
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyro-ppl", "normflows"))
    compiled = f"Nothing could be compiled here: {no_compiler()}" if no_compiler() else "Compiled: by torch.compile"
    return f"""# Speed

Written by `make bench`. Each ratio is taken in several turns, from the shortest rounds: the median and the range of the
turns. Forward and backward, one thread, float32, the post's settings (paper's û), unless said otherwise. {compiled};
the compilation itself is not counted.

Machine: {cpu}, {os.cpu_count()} cores. Python {platform.python_version()}, {", ".join(versions)}.
Data: {images().name}. {timed["datetime"][:10]}.

| what | ratio | range | goal | |
|---|---|---|---|---|
{chr(10).join(lines)}

The products are the eleven of the model's linear layers, forward and backward. A chain is (B, K, D). Nine trainings:
K = 0, 3, 16, three seeds, two epochs each; in a real sweep the start of the workers counts for less. Epochs to an ELBO:
from the histories in `results/runs/`, where a schedule has at least three seeds. No GPU was measured.
"""


if __name__ == "__main__":
    content = table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with replacing(RESULTS.parent / "bench.md") as temporary:
        temporary.write_text(content, encoding="utf-8", newline="\n")
    print(content)
