"""The loop: equal seeds give equal bits, a shorter run is the start of a longer one, surroundings have no say."""

import contextlib
import io
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from planar_helpers import checkpoint, train
from planar_helpers.data import Images, to_float
from planar_helpers.train import drop_tiny, epochs_for, fit, mean_terms, train_or_load
from planar_helpers.vae import PlanarVAE


@pytest.fixture
def few(digits: Images) -> Images:
    return Images(digits.train[:250], digits.train_labels[:250], digits.test[:50], digits.test_labels[:50], "few")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Where conftest has the runs go."""
    return tmp_path / "runs"


@pytest.fixture
def trained_epochs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs that are trained, one by one, whoever trains them."""
    epochs, bar = [], train._progress_bar

    def watched(*args: Any) -> Iterator[int]:
        for epoch in bar(*args):
            epochs.append(epoch + 1)
            yield epoch

    monkeypatch.setattr(train, "_progress_bar", watched)
    return epochs


class Interrupted(Exception):
    pass


@contextmanager
def interrupted_after(monkeypatch: pytest.MonkeyPatch, writes: int, before_the_write: bool = False) -> Iterator[None]:
    """Stop as if the power failed, at one of the writes."""
    write, done = checkpoint._write, []

    def failing(state: dict, path: Path) -> None:
        done.append(path)
        if before_the_write and len(done) == writes:
            raise Interrupted
        write(state, path)
        if len(done) == writes:
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpoint, "_write", failing)
        yield


def fresh(K: int = 3) -> PlanarVAE:
    torch.manual_seed(7)
    return PlanarVAE(hidden=20, K=K)


def same(one: PlanarVAE, other: PlanarVAE) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def fresh_for_runs() -> PlanarVAE:
    """The model that train_or_load begins with."""
    torch.manual_seed(0)
    return PlanarVAE(hidden=20)


def equal(one: train.History, other: train.History) -> bool:
    return all(torch.equal(a, b) for i in (0, 1) for a, b in zip(one[i], other[i], strict=True))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_two_runs_of_one_seed_are_equal_bit_for_bit_and_another_seed_differs(few: Images, schedule: str) -> None:
    models, histories = [fresh() for _ in range(3)], []
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(5)  # the global stream's state before the run must not matter
        histories.append(fit(model, few, epochs=2, schedule=schedule, seed=seed, progress=False))
    assert same(models[0], models[1]) and not same(models[0], models[2])
    assert torch.equal(histories[0].test.elbo, histories[1].test.elbo)
    assert not torch.equal(histories[0].test.elbo, histories[2].test.elbo)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    few: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_epochs: list[int], schedule: str, before: bool
) -> None:
    whole = fresh()
    expected = fit(whole, few, epochs=4, schedule=schedule, progress=False)
    path = tmp_path / "run.pt"
    with interrupted_after(monkeypatch, 2, before):
        fit(fresh(), few, epochs=4, schedule=schedule, checkpoint=path, progress=False)
    trained_epochs.clear()
    resumed = fresh()
    history = fit(resumed, few, epochs=4, schedule=schedule, checkpoint=path, progress=False)
    assert same(whole, resumed) and equal(history, expected)
    assert trained_epochs == ([2, 3, 4] if before else [3, 4])
    again = fit(fresh(), few, epochs=4, schedule=schedule, checkpoint=path, progress=False)
    assert equal(again, expected) and len(trained_epochs) < 4  # nothing was left to train


@pytest.mark.parametrize("order", [(1, 4, 12), (12, 1, 3, 4, 10), (4, 2, 11)])
def test_a_shorter_run_is_the_start_of_a_longer_one_bit_for_bit(
    few: Images, runs: Path, trained_epochs: list[int], order: tuple[int, ...]
) -> None:
    few, alone = few._replace(train=few.train[:120]), {}
    for epochs in order:
        model = fresh_for_runs()
        alone[epochs] = model, fit(model, few, epochs, progress=False)
    trained_epochs.clear()
    for epochs in order:
        model, history = train_or_load(few, epochs, hidden=20, progress=False)
        assert same(model, alone[epochs][0]) and equal(history, alone[epochs][1]), epochs
        longest = alone[max(alone)][1]
        assert torch.equal(history.test.kl, longest.test.kl[:epochs])
    expected = {
        (1, 4, 12): [*range(1, 13)],
        (12, 1, 3, 4, 10): [*range(1, 13), 4],
        (4, 2, 11): [1, 2, 3, 4, 2, *range(5, 12)],
    }
    assert trained_epochs == expected[order]  # only what was not kept is trained again, from the last that was
    kept = {int(path.stem.split("-")[-1]) for path in runs.glob("*.pt")}
    assert kept == set(order) | {n for n in (1, 3, 10) if n <= max(order)}
    assert len(list(runs.glob("*.lock"))) == 1 and not list(runs.glob("*.unfinished"))


def test_with_a_schedule_each_length_is_its_own_run(few: Images, runs: Path, trained_epochs: list[int]) -> None:
    histories = [train_or_load(few, n, hidden=20, schedule="cosine", progress=False)[1] for n in (3, 4)]
    assert not torch.equal(histories[0].test.elbo, histories[1].test.elbo[:3])
    assert trained_epochs == [1, 2, 3, 1, 2, 3, 4] and len(list(runs.glob("*.pt"))) == 2


@pytest.mark.parametrize("writes", [1, 2, 3, 4])
@pytest.mark.parametrize("before", [False, True])
def test_train_or_load_goes_on_from_wherever_it_was_interrupted(
    few: Images, runs: Path, monkeypatch: pytest.MonkeyPatch, trained_epochs: list[int], writes: int, before: bool
) -> None:
    with interrupted_after(monkeypatch, writes, before):
        train_or_load(few, 5, hidden=20, progress=False)
    trained_epochs.clear()
    history = train_or_load(few, 5, hidden=20, progress=False)[1]
    assert equal(history, fit(fresh_for_runs(), few, 5, progress=False))
    assert trained_epochs[: 5 - writes] == list(range(writes + (not before), 6))[: 5 - writes]
    assert not list(runs.glob("*.unfinished"))


def test_what_an_interrupted_longer_run_left_can_be_asked_for(
    few: Images, runs: Path, monkeypatch: pytest.MonkeyPatch, trained_epochs: list[int]
) -> None:
    with interrupted_after(monkeypatch, 6, before_the_write=True):
        train_or_load(few, 9, hidden=20, progress=False)
    assert [path.name[-13:] for path in runs.glob("*.unfinished")] == ["-5.unfinished"]
    train_or_load(few, 4, hidden=20, progress=False)  # goes on from 3, and leaves the longer one's state alone
    assert trained_epochs == [1, 2, 3, 4, 5, 6, 4] and len(list(runs.glob("*.unfinished"))) == 1
    train_or_load(few, 5, hidden=20, progress=False)
    assert len(trained_epochs) == 7 and not list(runs.glob("*.unfinished"))
    train_or_load(few, 9, hidden=20, progress=False)
    assert trained_epochs[7:] == [6, 7, 8, 9]


def test_training_improves_on_the_best_independent_pixels(digits: Images) -> None:
    model = PlanarVAE(hidden=50)
    history = fit(model, digits, epochs=12, lr=1e-2, batch_size=50, progress=False)
    p = to_float(digits.train).mean(0).clamp(1e-4, 1 - 1e-4)
    x = to_float(digits.test)
    independent = (x * p.log() + (1 - x) * (1 - p).log()).sum(1).mean()
    assert history.test.elbo[-1] > independent + 5
    assert history.train.elbo.shape == (12,) and history.train.elbo[-1] > history.train.elbo[0]


def test_history_holds_the_means_of_the_four_terms(few: Images) -> None:
    few = few._replace(test=torch.zeros_like(few.test))  # blank: nothing like the training images
    model = fresh()
    history = fit(model, few, epochs=20, lr=1e-2, progress=False)
    torch.manual_seed(1)
    means = mean_terms(model, few.test)
    assert abs(history.test.elbo[-1] - history.train.elbo[-1]) > 20
    assert history.train.elbo.dtype == history.test.elbo.dtype == torch.float64
    for name, value in means._asdict().items():
        assert getattr(history.test, name)[-1].item() == pytest.approx(value.item(), rel=0.05, abs=0.5)
    assert history.test.elbo == pytest.approx(
        history.test.log_px_z + history.test.log_pz - history.test.log_q0 + history.test.sum_ladj
    )


def test_tiny_weights_are_dropped_and_others_are_left(few: Images) -> None:
    model, black = fresh(), int((few.train.sum(0) == 0).nonzero()[0])
    with torch.no_grad():
        model.encoder[0].weight[:, black] = 1e-25  # no pixel, no gradient: weight decay alone moves it
    fit(model, few, epochs=1, progress=False)
    weight = model.encoder[0].weight
    assert (weight[:, black] == 0).all()
    assert (weight != 0).float().mean() > 0.5
    smallest = torch.cat([p.detach().flatten().abs() for p in model.parameters()])
    assert smallest[smallest > 0].min() >= 1e-20


def test_labels_never_reach_training(few: Images) -> None:
    one, other = fresh(), fresh()
    fit(one, few, epochs=1, progress=False)
    fit(other, few._replace(train_labels=None, test_labels=None), epochs=1, progress=False)
    assert same(one, other)


def test_train_or_load_trains_once_and_tells_settings_apart(
    few: Images, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model, history = train_or_load(few, 2, hidden=20, progress=False)
    first = capsys.readouterr().out

    def no_epoch_is_left(start: int, epochs: int, *_: Any) -> Iterator[int]:
        return iter(()) if start == epochs else pytest.fail("trained again")

    monkeypatch.setattr(train, "_progress_bar", no_epoch_is_left)
    again, loaded = train_or_load(few, 2, hidden=20, progress=False)
    assert same(model, again) and torch.equal(history.train.elbo, loaded.train.elbo)
    assert capsys.readouterr().out == first and "few" in first
    assert sorted(path.suffix for path in runs.iterdir()) == [".lock", ".pt", ".pt"]
    changed = (
        lambda: train_or_load(few, 3, hidden=20),
        lambda: train_or_load(few, 2, hidden=21),
        lambda: train_or_load(few, 2, hidden=20, seed=1),
        lambda: train_or_load(few, 2, hidden=20, K=0),
        lambda: train_or_load(few, 2, hidden=20, constraint="paper"),
        lambda: train_or_load(few, 2, hidden=20, lr=2e-3),
        lambda: train_or_load(few._replace(name="other"), 2, hidden=20),
    )
    for call in changed:
        with pytest.raises(pytest.fail.Exception):
            call()


def test_another_data_set_of_the_same_name_is_another_run(few: Images) -> None:
    model, _ = train_or_load(few, 1, hidden=20, progress=False)
    assert not same(model, train_or_load(few._replace(train=255 - few.train), 1, hidden=20, progress=False)[0])


def test_what_is_drawn_next_does_not_depend_on_training_or_loading(few: Images, runs: Path) -> None:
    drawn = []
    for _ in range(2):
        train_or_load(few, 1, hidden=20, progress=False)
        drawn.append(torch.rand(3))
    torch.manual_seed(0)
    assert torch.equal(*drawn) and torch.equal(drawn[0], torch.rand(3))


def test_a_double_model_is_trained_in_double(few: Images) -> None:
    model = fresh().double()
    history = fit(model, few, epochs=1, progress=False)
    assert model.heads.weight.dtype == torch.float64 and torch.isfinite(history.test.elbo).all()


def test_a_log_gets_plain_lines_and_no_carriage_return(few: Images, capsys: pytest.CaptureFixture) -> None:
    fit(fresh(), few, epochs=3)
    text = capsys.readouterr().err
    assert text.count("\n") == 3 and "\r" not in text and "epoch 3 of 3" in text
    fit(fresh(), few, epochs=2, progress=False)
    assert capsys.readouterr().err == ""


def test_a_loss_that_is_not_finite_stops_the_run(few: Images) -> None:
    model = fresh()
    with torch.no_grad():
        model.decoder[0].weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite in epoch 1"):
        fit(model, few._replace(train=few.train[:100]), epochs=1, progress=False)  # one batch: log q0 is still finite


def test_budget_chooses_the_epochs(digits: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    many = digits._replace(train=torch.zeros(60_000, 1, dtype=torch.uint8))  # as many as MNIST's
    for name, of_digits, of_mnist in (("full", 400, 100), ("quick", 100, 3)):
        monkeypatch.setenv("PLANAR_BUDGET", name)
        assert (epochs_for(digits), epochs_for(many)) == (of_digits, of_mnist)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be"),
        ({"epochs": 1.5}, ValueError, "epochs must be"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"lr": 0.0}, ValueError, "lr must be"),
        ({"lr": float("nan")}, ValueError, "lr must be"),
        ({"lr": float("inf")}, ValueError, "lr must be"),
        ({"lr": "fast"}, ValueError, "lr must be"),
        ({"epochs": True}, ValueError, "epochs must be"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"seed": 1.5}, ValueError, "seed must be"),
        ({"batch_size": np.float64(2)}, ValueError, "batch_size must be"),
        ({"lr": True}, ValueError, "lr must be positive"),
        ({"weight_decay": -1e-9}, ValueError, "weight_decay must be at least 0"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay must be"),
        ({"weight_decay": None}, ValueError, "weight_decay must be"),
        ({"checkpoint": "no/such/folder/run.pt"}, FileNotFoundError, "checkpoint must lie in an existing folder"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of"),
        ({"clip": 0.0}, ValueError, "clip must be positive"),
        ({"clip": float("inf")}, ValueError, "clip must be"),
        ({"warmup": -1}, ValueError, "warmup must be"),
        ({"warmup": 0.5}, ValueError, "warmup must be"),
        ({"binarise": 1}, ValueError, "binarise must be True or False"),
    ],
)
def test_bad_settings_get_a_clear_error(few: Images, change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fit(fresh(), few, **{"epochs": 1, **change})


def test_bad_data_gets_a_clear_error(few: Images) -> None:
    for bad, error in (
        (few._replace(train=few.train.float()), TypeError),
        (few._replace(train=few.train.numpy()), TypeError),
        (few._replace(train=few.train[:, :700]), ValueError),
        (few._replace(train=few.train[:0]), ValueError),
        (few._replace(test=few.test[0]), ValueError),
    ):
        with pytest.raises(error, match=r"images\.(train|test) must"):
            fit(fresh(), bad, epochs=1)


# --- what the loop does, term by term -----------------------------------------------------------------------------


def by_hand(
    few: Images, epochs: int, lr: float = 1e-3, weight_decay: float = 1e-5, cosine: bool = False,
    clip: float | None = None, warmup: int = 0, binarise: bool = False,
) -> tuple:  # fmt: skip
    """The training written down a second time, with torch's own schedule; 250 images make batches of 100, 100, 50."""
    model = fresh().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    steps = 3 * epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    x, train_means, test_means, done = to_float(few.train, torch.float64), [], [], 0
    torch.manual_seed(0)
    for _ in range(epochs):
        order, total = torch.randperm(250), torch.zeros(4).double()
        for i in (order[:100], order[100:200], order[200:]):
            optimizer.zero_grad()
            terms = model(torch.bernoulli(x[i]) if binarise else x[i])
            done += 1
            beta = 1 if done >= 3 * warmup else done / (3 * warmup)
            (-terms.log_px_z.mean() + beta * terms.kl.mean()).backward()
            if clip is not None:
                norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
                for p in model.parameters():
                    p.grad *= min(1.0, clip / (norm + 1e-6))
            optimizer.step()
            if schedule is not None:
                schedule.step()
            total += torch.stack(terms).detach().double().sum(1)
        for parameter, averages in optimizer.state.items():
            for tensor in (parameter.data, averages["exp_avg"], averages["exp_avg_sq"]):
                tensor[tensor.abs() < 1e-20] = 0
        train_means.append(total / 250)
        test_means.append(torch.stack(model(to_float(few.test, torch.float64))).detach().mean(1))
    return model, torch.stack(train_means, 1), torch.stack(test_means, 1)


@pytest.mark.parametrize(
    "changes", [{}, {"lr": 3e-3}, {"weight_decay": 0.05}, {"weight_decay": 0.0}, {"cosine": True, "lr": 5e-3},
     {"clip": 5.0}, {"warmup": 2}, {"binarise": True}], ids=str,
)  # fmt: skip
def test_fit_is_the_loop_written_down_a_second_time(few: Images, changes: dict) -> None:
    other, train_means, test_means = by_hand(few, 3, **changes)
    settings = {key: value for key, value in changes.items() if key != "cosine"}
    model = fresh().double()
    history = fit(model, few, 3, schedule="cosine" if "cosine" in changes else "constant", progress=False, **settings)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-10)
    assert torch.allclose(torch.stack(tuple(history.train)), train_means, rtol=1e-9)
    assert torch.allclose(torch.stack(tuple(history.test)), test_means, rtol=1e-9)


def test_small_numbers_are_dropped_from_weights_and_averages_at_the_threshold() -> None:
    parameter = torch.nn.Parameter(torch.tensor([3e-21, -3e-21, 3e-20, -3e-20, 1.0]))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.zeros(5)
    optimizer.step()
    optimizer.state[parameter]["exp_avg"].copy_(parameter.detach())
    drop_tiny(optimizer)
    for tensor in (parameter, optimizer.state[parameter]["exp_avg"]):
        assert (tensor == 0).tolist() == [True, True, False, False, False]
    drop_tiny(optimizer, below=0.1)
    assert (parameter == 0).tolist() == [True, True, True, True, False]


def test_mean_terms_weighs_each_image_once(few: Images) -> None:
    model = fresh()
    torch.manual_seed(1)
    means = mean_terms(model, few.train[:50], batch_size=30)
    torch.manual_seed(1)
    one, other = model(to_float(few.train[:30])), model(to_float(few.train[30:50]))
    for mean, a, b in zip(means, one, other, strict=True):
        assert mean.item() == pytest.approx(torch.cat([a, b]).mean().item(), rel=1e-6)
    assert means.elbo.dtype == torch.float64


# --- surroundings -------------------------------------------------------------------------------------------------


@contextmanager
def default(device: str | None = None, dtype: torch.dtype | None = None) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or before)
        torch.set_default_device(device)
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default dtype": lambda: default(dtype=torch.float64),
    "default device": lambda: default(device="meta"),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_surroundings_have_no_say(few: Images, surroundings: Any, tmp_path: Path) -> None:
    expected, model = fresh(), fresh()
    history = fit(expected, few, 2, progress=False)
    with surroundings():
        found = fit(model, few, 1, checkpoint=tmp_path / "run.pt", progress=False)
        found = fit(model, few, 2, checkpoint=tmp_path / "run.pt", progress=False)
    assert same(model, expected) and equal(found, history)
    torch.manual_seed(3)
    measured = mean_terms(model, few.test)
    torch.manual_seed(3)
    with surroundings():
        assert mean_terms(model, few.test).elbo == measured.elbo


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_train_or_load_trains_and_loads_in_any_surroundings(
    few: Images, surroundings: Any, trained_epochs: list[int], runs: Path
) -> None:
    with surroundings():
        inside = few._replace(train=few.train + 0) if surroundings is torch.inference_mode else few
        made = train_or_load(inside, 2, hidden=20, progress=False)
    double = made[0].heads.weight.dtype == torch.float64
    assert double == (surroundings is SURROUNDINGS["default dtype"])
    if double:
        assert len(trained_epochs) == 2
    outside = train_or_load(few, 2, hidden=20, progress=False)
    assert len(trained_epochs) == 2 + 2 * double  # another dtype is another run
    with surroundings():
        again = train_or_load(few, 2, hidden=20, progress=False)
    assert len(trained_epochs) == 2 + 2 * double
    assert same(made[0], again[0]) and equal(made[1], again[1])
    assert double or same(made[0], outside[0])
    again[0](to_float(few.train, again[0].heads.weight.dtype)).loss.backward()  # what was loaded can be trained
    assert not again[1].test.elbo.is_inference()


def test_a_readers_dropout_trains_in_train_mode_and_is_measured_in_eval_mode(few: Images) -> None:
    modes = []

    class Watched(torch.nn.Dropout):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            modes.append(self.training)
            return super().forward(x)

    for mode in (True, False):
        model = fresh()
        model.encoder.append(Watched(0.5))
        model.encoder.append(torch.nn.BatchNorm1d(20))
        model.train(mode)
        model.decoder.train(not mode)
        modes.clear()
        fit(model, few, 1, progress=False)
        assert modes == [True, True, True, False]
        assert model.encoder[2].training == mode and model.decoder.training != mode and model.training == mode
        before = model.encoder[3].num_batches_tracked.item()
        mean_terms(model, few.test)
        assert modes[-1] is False and model.encoder[3].num_batches_tracked.item() == before == 3


def test_wrong_things_are_named(few: Images) -> None:
    model = fresh()
    loader = DataLoader(few.train)
    for call, message in (
        (lambda: fit(model, loader, 1), "images must be Images.*, got DataLoader"),
        (lambda: fit(model, few.train, 1), "images must be Images.*, got Tensor"),
        (lambda: fit(model, few.train.numpy(), 1), "images must be Images.*, got ndarray"),
        (lambda: fit(model, None, 1), "images must be Images.*, got NoneType"),
        (
            lambda: fit(torch.nn.DataParallel(model), few, 1),
            "model must be a PlanarVAE, got DataParallel",
        ),
        (
            lambda: fit(torch.optim.swa_utils.AveragedModel(model), few, 1),
            "model must be a PlanarVAE, got AveragedModel",
        ),
        (lambda: mean_terms(torch.nn.DataParallel(model), few.test), "model must be a PlanarVAE, got DataParallel"),
        (lambda: fit(torch.nn.Linear(2, 2), few, 1), "model must be a PlanarVAE, got Linear"),
        (lambda: fit(few, model, 1), "model must be a PlanarVAE, got Images"),
        (lambda: fit(PlanarVAE, few, 1), "model must be a PlanarVAE, got the class PlanarVAE"),
        (lambda: fit(fresh().half(), few, 1), "model must be float32 or float64, got torch.float16"),
        (lambda: fit(fresh().bfloat16(), few, 1), "model must be float32 or float64, got torch.bfloat16"),
        (lambda: mean_terms(fresh().half(), few.test), "model must be float32 or float64"),
        (lambda: mean_terms(model, few), "images must be a tensor of uint8, got Images"),
        (lambda: mean_terms(model, to_float(few.test)), "images must be a tensor of uint8, got torch.float32"),
        (lambda: train_or_load(loader, 1), "images must be Images.*, got DataLoader"),
        (lambda: train_or_load(few._replace(train=few.train.numpy()), 1), "images.train must be a tensor of uint8"),
        (
            lambda: train_or_load(few, 1, learning_rate=0.1),
            "no setting 'learning_rate': those of fit are batch_size, lr",
        ),
        (lambda: train_or_load(few, 1, checkpoint="x.pt"), "no setting 'checkpoint'"),
        (lambda: fit(model, few), "fit.. missing 1 required positional argument: 'epochs'"),
        (lambda: fit(model, few, 1, checkpoint=True), "checkpoint must be a path, got True"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    for call, message in (
        (lambda: train_or_load(few, 0), "epochs must be"),
        (lambda: train_or_load(few, 1, K=-1), "K must be"),
        (lambda: train_or_load(few, 1, seed=-1), "seed must be"),
        (lambda: train_or_load(few, 1, schedule="none"), "schedule must be"),
        (lambda: train_or_load(few, 1, constraint="none"), "constraint must be"),
        (lambda: mean_terms(model, few.test[:, :9]), r"images must have shape \(N ≥ 1, 784\)"),
        (lambda: mean_terms(model, few.test[:0]), r"images must have shape \(N ≥ 1, 784\), got \(0, 784\)"),
        (lambda: mean_terms(model, few.test, batch_size=0), "batch_size must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with torch.inference_mode():
        made_inside = fresh()
    with pytest.raises(ValueError, match="model was made inside torch.inference_mode"):
        fit(made_inside, few, 1)


def test_numbers_of_numpy_are_numbers(few: Images, trained_epochs: list[int]) -> None:
    one = train_or_load(few, 2, K=1, D=3, hidden=20, seed=5, batch_size=50, lr=0.25e-2, progress=False)[0]
    other = train_or_load(
        few, np.int64(2), K=np.int32(1), D=np.uint8(3), hidden=np.int64(20), seed=np.int64(5), batch_size=np.int16(50),
        lr=np.float64(0.25e-2), progress=False,
    )[0]  # fmt: skip
    assert same(one, other) and len(trained_epochs) == 2
    fit(fresh(), few, np.int64(1), np.int64(100), np.float32(1e-3), np.float64(0), seed=np.int64(0), progress=False)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk"])
def test_the_line_is_the_same_on_every_terminal(few: Images, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    train_or_load(few, 1, hidden=20, progress=False)
    stream.flush()
    line = raw.getvalue().decode("ascii")
    assert line.startswith("K = 3, shifted u_hat: 1 epochs on few, seed 0, test ELBO -") and line.endswith("nats\n")


def test_no_stderr_is_no_error(few: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stderr in (None, closed):
        monkeypatch.setattr(sys, "stderr", stderr)
        fit(fresh(), few, 1)


@pytest.mark.parametrize("failure", [OSError(30, "Read-only file system"), PermissionError(13, "Permission denied")])
def test_a_folder_that_cannot_be_written_to_is_read(
    few: Images, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, trained_epochs: list[int],
    failure: OSError,
) -> None:  # fmt: skip
    expected = train_or_load(few, 1, hidden=20, progress=False)
    names = sorted(runs.iterdir())
    capsys.readouterr()

    def refuse(*_: Any, **__: Any) -> None:
        raise failure

    for what in ("touch", "mkdir", "replace", "unlink", "rename"):
        monkeypatch.setattr(Path, what, refuse)
    monkeypatch.setattr(checkpoint.FileLock, "acquire", refuse)
    monkeypatch.setattr(checkpoint, "_write", refuse)
    found = train_or_load(few, 1, hidden=20, progress=False)
    assert same(found[0], expected[0]) and equal(found[1], expected[1]) and trained_epochs == [1]
    assert "cannot be written" not in capsys.readouterr().out
    longer = train_or_load(few, 2, hidden=20, progress=False)  # goes on from what is there, and keeps nothing
    out = capsys.readouterr().out
    assert trained_epochs == [1, 2] and equal(longer[1], fit(fresh_for_runs(), few, 2, progress=False))
    assert f"{runs} cannot be written to ({failure.strerror}): what is trained from here on is not kept" in out
    assert sorted(runs.iterdir()) == names


def with_little_room(call: Callable[[], Any]) -> tuple[Any, str]:
    """What the call returns, or the OSError it raises, in a process of its own, and what it prints there."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def answer() -> None:
        torch.set_num_threads(1)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                answered = call()
            except OSError as error:
                answered = error
        there.send_bytes(pickle.dumps((answered, printed.getvalue())))

    process = context.Process(target=answer)
    process.start()
    there.close()
    answered = pickle.loads(here.recv_bytes())
    process.join()
    return answered


def fill_the_disk() -> None:
    """Let no file of this process grow beyond 4 kB from here on: a write fails as on a full disk."""
    import resource  # Unix has it

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("full_from", "kept"), [(1, []), (2, ["1.pt"]), (5, ["1.pt", "3.pt", "4.unfinished"])])
def test_a_full_disk_costs_nothing_that_was_trained(few: Images, runs: Path, full_from: int, kept: list[str]) -> None:
    bar = train._progress_bar

    def filling(*args: Any) -> Iterator[int]:
        for epoch in bar(*args):
            if epoch + 1 == full_from:
                fill_the_disk()
            yield epoch

    def trained() -> tuple[PlanarVAE, train.History]:
        train._progress_bar = filling
        return train_or_load(few, 6, hidden=20, progress=False)

    (model, history), printed = with_little_room(trained)
    expected = fresh_for_runs()
    assert equal(history, fit(expected, few, 6, progress=False)) and same(model, expected)
    said, result = printed.splitlines()
    assert said == f"{runs} cannot be written to (File too large): what is trained from here on is not kept"
    assert result.startswith("K = 3, shifted u_hat: 6 epochs on few")
    assert sorted(path.name.split("-")[-1] for path in runs.iterdir() if path.suffix != ".lock") == kept


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_full_disk_under_a_checkpoint_is_an_error_and_the_old_file_stays(few: Images, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    fit(fresh(), few, 1, checkpoint=path, progress=False)
    old = path.read_bytes()

    def refused() -> None:
        fill_the_disk()
        fit(fresh(), few, 2, checkpoint=path, progress=False)

    error, _ = with_little_room(refused)
    assert isinstance(error, OSError) and error.filename == str(path)
    assert error.strerror == "checkpoint cannot be written (File too large)"
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_the_working_directory_may_change_between_calls(
    few: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_epochs: list[int]
) -> None:
    monkeypatch.setenv("PLANAR_RUNS", "runs of my own")
    for folder in ("ä one", "two"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        for _ in range(2):
            train_or_load(few, 1, hidden=20, progress=False)
        assert len(list((tmp_path / folder / "runs of my own").glob("*.pt"))) == 1
    assert trained_epochs == [1, 1]
    monkeypatch.setenv("PLANAR_RUNS", str(tmp_path / "ä one" / "runs of my own"))
    train_or_load(few, 1, hidden=20, progress=False)
    assert trained_epochs == [1, 1]


def _train_in_a_process(few: Images, epochs: int, counts: Any) -> None:
    bar = train._progress_bar

    def watched(*args: Any) -> Iterator[int]:
        for epoch in bar(*args):
            counts.put(epoch + 1)
            yield epoch

    train._progress_bar = watched
    torch.set_num_threads(1)
    train_or_load(few, epochs, hidden=20, progress=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_that_want_runs_of_one_family_wait_for_one_another(few: Images, runs: Path) -> None:
    context = multiprocessing.get_context("fork")
    counts = context.SimpleQueue()
    processes = [context.Process(target=_train_in_a_process, args=(few, epochs, counts)) for epochs in (10, 30, 3, 30)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    trained = []
    while not counts.empty():
        trained.append(counts.get())
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(trained) == list(range(1, 31))  # each epoch once, whoever came first
    assert sorted(int(path.stem.split("-")[-1]) for path in runs.glob("*.pt")) == [1, 3, 10, 30]
