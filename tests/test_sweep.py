"""Runs made, measured and kept by sweep.py and the command line: each once, whole, and the same however it is run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planar_helpers import __main__ as command_line
from planar_helpers import sweep
from planar_helpers.data import Images, hold_out, load_images, to_float
from planar_helpers.evaluate import inference_gap
from planar_helpers.quadrature import exact_log_px, main_island
from planar_helpers.train import train_or_load
from planar_helpers.vae import PlanarVAE

SMALL = {"data": ["digits"], "epochs": [2], "hidden": [10]}
ROOT = Path(__file__).resolve().parent.parent


def small(**changes: Any) -> list[sweep.Settings]:
    return sweep.combinations({**SMALL, **{name: list(values) for name, values in changes.items()}})


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def few(images: Images) -> Images:
    return images._replace(test=images.test[:60])


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PLANAR_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(sweep, "OWN", 5)
    monkeypatch.setattr(sweep, "SOME", 20)
    monkeypatch.setattr(sweep, "load_images", lambda name: few(load_images(name)))
    sweep._images.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a run: an ascent carries other last bits far
    yield tmp_path / "results" / "runs"
    torch.set_num_threads(threads)
    sweep._images.cache_clear()


# --- settings and names ---------------------------------------------------------------------------------------------


def test_combinations_have_the_seeds_outermost_and_the_defaults_elsewhere() -> None:
    runs = sweep.combinations({"K": [0, 16], "lr": [1e-3, 2e-3], "seed": [0, 1]})
    assert [(run["seed"], run["K"], run["lr"]) for run in runs] == [
        (seed, K, lr) for seed in (0, 1) for K in (0, 16) for lr in (1e-3, 2e-3)
    ]
    assert all({**run, "K": 3, "lr": 1e-3, "seed": 0} == sweep.DEFAULTS for run in runs)


def test_the_name_has_what_is_unusual_and_equal_settings_have_one_name() -> None:
    one, other, usual = (
        sweep.combinations({"hidden": [(500, 500)], "lr": [0.002]})[0],
        sweep.combinations({"hidden": [[500, 500]], "lr": [2e-3], "dropout": [0]})[0],
        sweep.combinations({})[0],
    )
    assert (
        sweep.path_of(one).name == "K=3-hidden=500x500-lr=0.002-seed=0.json"
        and sweep.path_of(usual).stem == "K=3-seed=0"
    )
    assert one == other and sweep.path_of(one) == sweep.path_of(other)
    values = {
        "data": "digits", "family": "translation", "K": 4, "constraint": "paper", "D": 3, "hidden": 10, "dropout": 0.1,
        "epochs": 3, "batch_size": 50, "lr": 0.1, "weight_decay": 0.0, "schedule": "cosine", "clip": 1.0, "warmup": 1,
        "binarise": True, "decoder": "K=0-seed=0", "seed": 1,
    }  # fmt: skip
    assert set(values) == set(sweep.DEFAULTS)
    names = {sweep.path_of({**usual, name: value}) for name, value in values.items()}
    assert len(names | {sweep.path_of(usual)}) == len(values) + 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"K": [-1]}, "K must be"), ({"family": ["sylvester"]}, "family must be one of"),
        ({"family": ["gaussian"]}, "with K = 0"), ({"lr": [0]}, "lr must be"), ({"epochs": [0]}, "epochs must"),
        ({"dropout": [1.0]}, "dropout must"), ({"hidden": [()]}, "hidden layers"), ({"data": ["cifar"]}, "data must"),
        ({"seed": [-1]}, "seed must be"), ({"schedule": ["linear"]}, "schedule must be"),
    ],
)  # fmt: skip
def test_settings_that_no_run_can_have_are_refused_before_any_run(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep.combinations({"K": [3], **bad})


# --- one run --------------------------------------------------------------------------------------------------------


def test_a_run_is_the_training_it_says_it_is(results: Path) -> None:
    (settings,) = small(seed=[1], family=["translation"], lr=[2e-3])
    path = sweep.run(settings)
    found = content(path)
    chosen = {name: value for name, value in settings.items() if name != "data"}
    _, history = train_or_load(hold_out(load_images("digits")), progress=False, **chosen)
    assert path.parent == results and found["settings"] == settings and "results" not in found
    assert found["data"].startswith("digits") and {"code", "torch", "python", "machine"} <= set(found)
    for part, terms in (("train", history.train), ("held out", history.test)):
        assert set(found["history"][part]) == set(terms._fields)
        for name, curve in terms._asdict().items():
            assert found["history"][part][name] == pytest.approx(curve.tolist(), abs=1e-4)


@pytest.mark.parametrize(("family", "K"), [("planar", 2), ("translation", 2), ("gaussian", 0)])
def test_what_is_measured_is_what_the_package_measures(results: Path, family: str, K: int) -> None:
    (settings,) = small(family=[family], K=[K], epochs=[3])
    images, found = few(load_images("digits")), content(sweep.run(settings, on_test=True))["results"]
    model = train_or_load(
        hold_out(images), progress=False, **{name: value for name, value in settings.items() if name != "data"}
    )[0]
    x = to_float(images.test)
    exact = exact_log_px(model, x)
    torch.manual_seed(1)
    draws = model.elbo_draws(x, model.encode(x), 400)
    gap = exact.log_px - draws.mean(0)
    error = (draws.std() / sweep.DRAWS**0.5 / len(x) ** 0.5).item()
    test = found["test"]
    assert test["log p(x)"] == pytest.approx(
        [exact.log_px.mean().item(), exact.log_px.std().item() / len(x) ** 0.5], abs=1e-3
    )
    assert test["ELBO"][0] == pytest.approx(draws.mean().item(), abs=6 * error)
    assert test["gap"][0] == pytest.approx(test["log p(x)"][0] - test["ELBO"][0], abs=1e-3)
    assert test["deciles of the gap"][5] == pytest.approx(gap.median().item(), rel=0.1)
    worst = gap.sort().values[-3:].sum() / gap.sum()  # 5 % of 60
    assert test["share of the worst 5 %"] == pytest.approx(worst.item(), rel=0.1)
    approximation = inference_gap(model, x[:5], start=main_island(model, x[:5])).approximation
    assert test["approximation"][0] == pytest.approx(approximation.mean().item(), abs=1e-4)
    assert (test["images"], found["train"]["images"]) == (60, 20) and "approximation" not in found["train"]
    assert found["train"]["ELBO"] != test["ELBO"]


def test_more_than_two_latents_are_measured_by_importance_sampling(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "SAMPLES", 50)
    (settings,) = small(D=[3], K=[2], binarise=[True])
    found = content(sweep.run(settings, on_test=True))
    assert "binarised" in found["data"]
    for part in found["results"].values():
        assert part["encoder: ELBO"][0] < part["encoder: log p(x)"][0] < 0
        assert 0 < part["encoder: error of an image"] < 1
    test = found["results"]["test"]
    assert test["encoder: ELBO"][0] < test["own: ELBO"][0] < test["own: log p(x)"][0] + 1


def test_binary_runs_train_on_grey_and_are_measured_on_binary_images() -> None:
    images = sweep._images("digits", True, True)
    assert images.test.unique().tolist() == [0, 255] and len(images.train.unique()) > 10
    assert torch.equal(images.test, sweep._images("digits", True, True).test)


def test_what_is_done_is_not_done_again_and_what_is_missing_is_added(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (settings,) = small()
    path = sweep.run(settings)
    before = content(path)
    monkeypatch.setattr(sweep, "train_or_load", lambda *_, **__: pytest.fail("trained again"))
    assert sweep.run(settings) == path and sweep.is_done(settings, False) and not sweep.is_done(settings, True)
    monkeypatch.undo()
    monkeypatch.setenv("PLANAR_RESULTS", str(results.parent))
    monkeypatch.setattr(sweep, "measure", lambda model, images: {"test": {"images": len(images.test)}})
    sweep.run(settings, on_test=True)
    assert content(path) == {**before, "results": {"test": {"images": 60}}} and sweep.is_done(settings, True)


def test_a_loss_that_is_not_finite_is_a_result(results: Path) -> None:
    (settings,) = small(lr=[1e30], epochs=[3])
    found = content(sweep.run(settings, on_test=True))
    assert "not finite in epoch" in found["failed"] and "history" not in found
    assert sweep.is_done(settings, False) and sweep.is_done(settings, True), "it would fail again"


def test_a_json_that_cannot_be_written_leaves_the_old_one(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings,) = small()
    path = sweep.run(settings)
    before = path.read_bytes()
    monkeypatch.setattr(sweep.json, "dumps", lambda *_, **__: "half\udcff")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        sweep.run(settings, on_test=True)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_number_of_threads_has_no_say_and_is_left_as_it_was(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = sweep.train_or_load
    monkeypatch.setattr(
        sweep, "train_or_load", lambda *a, **k: (seen.append(torch.get_num_threads()), original(*a, **k))[1]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sweep.run(small()[0])
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_encoder_is_refitted_to_the_decoder_of_another_run(results: Path) -> None:
    (other,) = small(K=[0], seed=[1])
    with pytest.raises(ValueError, match="decoder must name a run that is made"):
        small(decoder=["K=9-seed=0"])
    name = sweep.run(other).stem
    refits = small(K=[0, 2], seed=[1], decoder=[name.replace("seed=1", "seed={seed}")], epochs=[4])
    own = sweep.trained(other)[0]
    found = []
    for settings in refits:
        model, history = sweep.trained(settings)
        assert settings["decoder"] == name and f"decoder={name}" in sweep.path_of(settings).stem
        for mine, theirs in zip(model.decoder.parameters(), own.decoder.parameters(), strict=True):
            assert torch.equal(mine, theirs), "the decoder has moved"
        fresh = PlanarVAE(hidden=10, K=settings["K"])
        assert not torch.equal(model.heads.weight, fresh.heads.weight) and history.test.elbo[-1] > history.test.elbo[0]
        found.append(content(sweep.run(settings, on_test=True)))
    with pytest.raises(ValueError, match="decoder must be a model with d_x, hidden, D"):
        sweep.trained({**refits[0], "hidden": 11})
    (plain,) = small(K=[0], seed=[1], epochs=[4])
    assert content(sweep.run(plain))["history"] != found[0]["history"]
    assert found[0]["results"]["test"]["log p(x)"] == found[1]["results"]["test"]["log p(x)"], "one decoder, one p(x)"
    assert found[0]["results"]["test"]["ELBO"] != found[1]["results"]["test"]["ELBO"]


# --- many runs ------------------------------------------------------------------------------------------------------


def command(*words: str, **settings: Any) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **settings.pop("env", {})}
    return {"args": [sys.executable, "-m", *words], "env": environment, "cwd": settings.pop("cwd", None), **settings}


def test_a_sweep_on_two_cores_makes_the_same_runs_as_one_after_the_other(results: Path, tmp_path: Path) -> None:
    runs = small(K=[0, 2], seed=[0, 1])
    one_by_one = [content(sweep.run(settings)) for settings in runs]
    for path in results.iterdir():
        path.unlink()
    moved = {**os.environ, "PLANAR_RUNS": str(tmp_path / "other")}
    words = "planar_helpers sweep --data digits --epochs 2 --hidden 10 --K 0,2 --seed 0-1".split()
    done = subprocess.run(**command(*words, "--jobs", "2", env=moved), capture_output=True, text=True, check=True)
    assert [content(sweep.path_of(settings)) for settings in runs] == one_by_one
    assert "4/4" in done.stderr and ("s/run" in done.stderr or "run/s" in done.stderr), done.stderr
    again = subprocess.run(**command(*words, env=moved), capture_output=True, text=True, check=True)
    assert "digits:" not in again.stdout, "nothing is left to do, so no data is loaded"


def wait_for(ready: Any, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_training_that_is_killed_goes_on_to_the_same_numbers(results: Path, tmp_path: Path) -> None:
    (settings,) = small(epochs=[40], K=[1])
    undisturbed = content(sweep.run(settings))
    sweep.path_of(settings).unlink()
    words = ["planar_helpers", "train", "--data", "digits", "--epochs", "40", "--hidden", "10", "--K", "1"]
    moved = {"PLANAR_RUNS": str(tmp_path / "other")}
    with subprocess.Popen(
        **command(*words, env=moved), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_for(lambda: [*(tmp_path / "other").glob("*.unfinished")])
        process.send_signal(signal.SIGKILL)
    assert not sweep.path_of(settings).exists() and not [*results.glob("*")]
    subprocess.run(**command(*words, env=moved), capture_output=True, check=True)
    assert content(sweep.path_of(settings)) == undisturbed


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """A real scheduler and two worker processes on loopback: its address, and the workers."""
    pytest.importorskip("distributed")
    where = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    file = tmp_path / "scheduler.json"
    start = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    processes = [subprocess.Popen(**command("distributed.cli.dask_scheduler", *start, **where))]
    try:
        wait_for(file.is_file)
        address = json.loads(file.read_text())["address"]
        work = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path / "dask")]
        processes += [subprocess.Popen(**command("distributed.cli.dask_worker", address, *work, **where)) for _ in "12"]
        yield address, processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_cluster_makes_the_same_runs_and_may_lose_a_worker(
    results: Path, cluster: tuple[str, list[subprocess.Popen]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, workers = cluster
    runs = small(K=[0, 1], seed=[0, 1], epochs=[25])
    words = "planar_helpers sweep --data digits --epochs 25 --hidden 10 --K 0,1 --seed 0,1".split()
    with subprocess.Popen(**command(*words, "--scheduler", address), stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: [*(tmp_path / "runs").glob("*.unfinished")])
        workers[0].send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    on_cluster = [content(sweep.path_of(settings)) for settings in runs]
    for settings in runs:
        sweep.path_of(settings).unlink()
    monkeypatch.setenv("PLANAR_RUNS", str(tmp_path / "here"))  # trained anew, by this process alone
    assert [content(sweep.run(settings)) for settings in runs] == on_cluster
    assert len([*results.iterdir()]) == len(runs)


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,3,16", [0, 3, 16]), ("0-2", [0, 1, 2]), ("1e-3,2e-3", [0.001, 0.002]), ("500x400,50", [(500, 400), 50]),
        ("none", [None]), ("yes,no", [True, False]), ("planar,gaussian", ["planar", "gaussian"]), ("-1", [-1]),
        ("3.5", [3.5]), ("1e-3-2", ["1e-3-2"]), ("", [""]), ("__import__('os')", ["__import__('os')"]),
    ],
)  # fmt: skip
def test_lists_of_values_are_read(text: str, expected: list[Any]) -> None:
    assert command_line.values(text) == expected
    assert [type(value) for value in command_line.values(text)] == [type(value) for value in expected]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "train | evaluate | sweep"), (["fly"], "fly"), (["train", "--K", "three"], "K must be"),
        (["train", "--K", "0,3"], "use sweep"), (["train", "--colour", "red"], "colour"),
        (["sweep", "--lr", "-1"], "lr"),
        (["sweep", "--jobs", "0"], "--jobs must be"), (["sweep", "--jobs", "many"], "--jobs"),
        (["evaluate", "--hidden", "500x0"], "hidden must be"), (["train", "--binarise", "maybe"], "binarise must be"),
        (["train", "--K", ""], "K must be"), (["train", "--K"], "expected one argument"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        command_line.main(words)
    said = capsys.readouterr()
    assert left.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and message in said.err


def test_missing_data_is_said_in_one_line(
    results: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANAR_DATA", "no-such-folder")
    monkeypatch.setattr(sweep, "load_images", load_images)
    assert command_line.main(["train", "--K", "0", "--epochs", "1"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "PLANAR_DATA must name an existing folder" in said


def test_help_names_every_setting_with_its_default(capsys: pytest.CaptureFixture) -> None:
    assert set(command_line.HELP) == set(sweep.DEFAULTS)
    with pytest.raises(SystemExit) as left:
        command_line.main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    for name, default in sweep.DEFAULTS.items():
        assert f"--{name.replace('_', '-')} " in said
        assert f"(default {'no' if default is False else 'none' if default is None else default})" in said


def test_a_plan_is_one_sweep_with_the_seeds_outermost(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plan = tmp_path / "A.plan"
    plan.write_text("Two arms.\n\n--K 0,16 --seed 0-1 --lr 2e-3\n--family translation --seed 0,1\n", encoding="utf-8")
    read = command_line.parse(["sweep", "--plan", str(plan)])
    runs = read.runs
    assert [(run["seed"], run["family"], run["K"]) for run in runs] == [
        (seed, *arm) for seed in (0, 1) for arm in (("planar", 0), ("planar", 16), ("translation", 3))
    ]
    assert not read.test
    plan.write_text("--K 0,16\n--K 3 --test\n", encoding="utf-8")
    assert command_line.parse(["sweep", "--plan", str(plan)]).test, "a plan may ask for the test images"
    for text, message in (("--K -1", "K must be"), ("--colour red", "--colour"), ("--K '0", "quotation")):
        plan.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit) as left:
            command_line.parse(["sweep", "--plan", str(plan)])
        said = capsys.readouterr().err
        assert left.value.code == 2 and message in said and said.count("\n") == 1
    with pytest.raises(SystemExit) as left:
        command_line.parse(["sweep", "--plan", str(tmp_path / "none.plan")])
    assert left.value.code == 2 and "none.plan" in capsys.readouterr().err


def test_measured_runs_are_found_by_their_settings_in_the_order_of_names(tmp_path: Path) -> None:
    found = small(seed=[1, 0], hidden=[(4, 4)])
    for run, results in ((found[0], {}), (found[1], {}), (small(seed=[2], hidden=[(4, 4)])[0], None)):
        whole = {"settings": run} | ({} if results is None else {"results": results})
        (tmp_path / f"seed={run['seed']}.json").write_text(json.dumps(whole), encoding="utf-8")
    assert [one["settings"]["seed"] for one in sweep.measured(tmp_path, hidden=(4, 4))] == [0, 1]
    assert sweep.measured(tmp_path, hidden=(4, 4), seed=1)[0]["settings"] == json.loads(json.dumps(found[1]))
    assert sweep.measured(tmp_path, hidden=4) == []
    with pytest.raises(KeyError, match="hiden"):
        sweep.measured(tmp_path, hiden=4)


def test_the_plans_of_the_repository_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANAR_RESULTS", str(ROOT / "figures" / "results"))  # where the decoders' runs are
    plans = sorted((ROOT / "figures" / "results" / "runs").glob("*.plan"))
    assert plans
    for plan in plans:
        assert len(command_line.parse(["sweep", "--plan", str(plan)]).runs) > 1


def test_evaluate_prints_what_it_found(results: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["evaluate", "--data", "digits", "--epochs", "1", "--hidden", "10", "--K", "0"]
    assert command_line.main(words) == 0
    said = capsys.readouterr().out
    assert '"log p(x)"' in said and "K=0" in said


@pytest.mark.parametrize("path", sorted((ROOT / "figures" / "results" / "models").glob("*.npz")), ids=lambda p: p.stem)
def test_the_committed_weights_are_those_that_were_measured(path: Path) -> None:
    run = json.loads((path.parent.parent / "runs" / f"{path.stem}.json").read_text(encoding="utf-8"))
    model = PlanarVAE(K=run["settings"]["K"], constraint=run["settings"]["constraint"])
    model.load_state_dict({name: torch.from_numpy(values) for name, values in np.load(path).items()})  # no pickle
    images = load_images()
    if not images.name.startswith("MNIST"):
        pytest.skip("MNIST is not here")
    draws = model.elbo_draws(to_float(images.test), model.eval().encode(to_float(images.test)), 2).detach().mean(dim=0)
    assert draws.mean().item() == pytest.approx(run["results"]["test"]["ELBO"][0], abs=0.3)
