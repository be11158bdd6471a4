"""What `make bench` states: same work on both sides, the right ratio, and no row that is silently left out."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from planar_helpers import sweep
from planar_helpers.vae import PlanarVAE

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench", ROOT / "tests" / "bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_posts_loop_has_the_same_loss(bench: ModuleType) -> None:
    model, plain = PlanarVAE(constraint="paper"), bench.PlainVAE()
    plain.hidden.load_state_dict(model.encoder[0].state_dict())
    for head, weight, bias in zip(
        plain.heads, model.heads.weight.split(model.head_sizes), model.heads.bias.split(model.head_sizes), strict=True
    ):
        head.load_state_dict({"weight": weight, "bias": bias})
    for mine, other in ((0, 0), (2, 2)):
        plain.out[mine].load_state_dict(model.decoder[other].state_dict())
    x = torch.rand(50, 784)
    losses = []
    for loss_of in (plain, lambda x: model.elbo_terms(x).loss):
        torch.manual_seed(1)
        losses.append(loss_of(x))
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-3)
    gradients = [
        torch.autograd.grad(losses[0], plain.out[0].weight)[0],
        torch.autograd.grad(losses[1], model.decoder[0].weight)[0],
    ]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def timed(cases: dict[tuple[str, str], list[float]], **beside: list[float]) -> dict[str, Any]:
    """What pytest-benchmark would write of cases and their shortest rounds, turn by turn."""
    found = [
        {"stats": {"min": seconds}, "extra_info": {"group": group, "case": case, "turn": turn, "beside": beside}}
        for (group, case), turns in cases.items()
        for turn, seconds in enumerate(turns)
    ]
    return {"benchmarks": found, "machine_info": {}, "datetime": "2026-01-02T03:04:05"}


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {what: rest for what, *rest in cells[2:]}


@pytest.fixture
def without_extras(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(bench, "no_compiler", lambda: "no compiler")
    monkeypatch.setattr(bench, "images", lambda: bench.load_images("digits"))


def test_a_ratio_is_of_one_turn_and_the_table_says_missed_and_not_measured(
    bench: ModuleType, without_extras: None, tmp_path: Path
) -> None:
    # A slow phase: everything takes ten times as long in the last turn. Within each turn the ratio is about 2.
    cases = {
        ("step", "K = 3"): [2.2, 2.0, 21.0],
        ("step", "products"): [1.0, 1.0, 10.0],
        ("step", "K = 0"): [2.1, 2, 20],
    }
    text = bench.table(timed(cases, memory=[0.7, 0.0]), tmp_path)
    found = rows(text)
    assert found["step, K = 3, against its matrix products"] == ["2.10", "2.00 to 2.20", "≤ 1.5", "missed"]
    assert found["step, K = 3, against K = 0"] == ["1.05", "1.00 to 1.05", "", ""]
    assert found["memory of exact log p(x), in GiB"][0::3] == ["0.70", "met"]
    assert found["the same, compiled"] == ["not measured", "", "≤ 1.3", ""] and "no compiler" in text
    assert len(found) == len(bench.ROWS) + 3


def test_a_goal_is_met_from_its_own_side(bench: ModuleType) -> None:
    assert [bench.line("", [2.0], goal).split("|")[-2].strip() for goal in ("≤ 2", "≥ 2", "> 2", "> 1", "≤ 1", "")] == [
        "met", "met", "missed", "met", "missed", "",
    ]  # fmt: skip


def history(folder: Path, elbo: list[float], **settings: Any) -> None:
    terms = {"log_px_z": elbo, "log_pz": [1.0] * len(elbo), "log_q0": [3.0] * len(elbo), "sum_ladj": [2.0] * len(elbo)}
    found = {"settings": {**sweep.DEFAULTS, **settings}, "history": {"held out": terms}}
    name = f"K=3-{settings['schedule']}-{len(list(folder.iterdir()))}"
    (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


def test_epochs_until_a_bound_are_medians_of_three_seeds(
    bench: ModuleType, without_extras: None, tmp_path: Path
) -> None:
    for late in (0, 1, 5):
        history(tmp_path, [-150.0] * (10 + late) + [-140.0] * 9, schedule="constant", seed=late)
        history(tmp_path, [-150.0] * (3 + late) + [-140.0] * 9, schedule="cosine", lr=0.002, seed=late)
    history(tmp_path, [-140.0] * 9, schedule="cosine", lr=0.004)  # one seed is none
    history(tmp_path, [-140.0] * 9, schedule="constant", decoder="another")  # another experiment
    found = bench.epochs_until(tmp_path)
    # one epoch of three at −140 is enough: −146.67
    assert found["constant step size 0.001"] == [11, 12, 16]
    assert found["cosine step size 0.002 over 100 epochs"] == [4, 5, 9]
    assert rows(bench.table(timed({}), tmp_path)).popitem()[1] == ["2.40", "2.40 to 2.40", "≥ 3", "missed"]
    (tmp_path / "K=3-constant-0.json").unlink()
    assert rows(bench.table(timed({}), tmp_path)).popitem()[1][0] == "not measured"


def test_the_committed_table_has_every_row(bench: ModuleType) -> None:
    found = rows((ROOT / "figures" / "bench.md").read_text(encoding="utf-8"))
    assert list(found)[: len(bench.ROWS)] == [row[0] for row in bench.ROWS]
