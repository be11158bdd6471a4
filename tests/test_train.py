"""The loop: equal seeds give equal bits, a resumed run equals an uninterrupted one, files are never half-written."""

from pathlib import Path

import pytest
import torch

from planar_helpers import train
from planar_helpers.data import Images, to_float
from planar_helpers.train import epochs_for, fit, mean_terms, train_or_load
from planar_helpers.vae import PlanarVAE


@pytest.fixture
def few(digits: Images) -> Images:
    return Images(digits.train[:250], digits.train_labels[:250], digits.test[:50], digits.test_labels[:50], "few")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def fresh(K: int = 3) -> PlanarVAE:
    torch.manual_seed(7)
    return PlanarVAE(hidden=20, K=K)


def same(one: PlanarVAE, other: PlanarVAE) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_two_runs_of_one_seed_are_equal_bit_for_bit_and_another_seed_differs(few: Images, schedule: str) -> None:
    models, histories = [fresh() for _ in range(3)], []
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(5)  # the global stream's state before the run must not matter
        histories.append(fit(model, few, epochs=2, schedule=schedule, seed=seed, progress=False))
    assert same(models[0], models[1]) and not same(models[0], models[2])
    assert torch.equal(histories[0].test.elbo, histories[1].test.elbo)
    assert not torch.equal(histories[0].test.elbo, histories[2].test.elbo)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    few: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    whole = fresh()
    expected = fit(whole, few, epochs=4, schedule=schedule, progress=False)
    path, torn, saved = tmp_path / "run.pt", fresh(), []
    save = train._save

    def save_twice_then_die(content: dict, target: Path) -> None:
        save(content, target)
        saved.append(target)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_save", save_twice_then_die)
    with pytest.raises(KeyboardInterrupt):
        fit(torn, few, epochs=4, schedule=schedule, checkpoint=path, progress=False)
    monkeypatch.setattr(train, "_save", save)
    resumed = fresh()
    history = fit(resumed, few, epochs=4, schedule=schedule, checkpoint=path, progress=False)
    assert same(whole, resumed)
    assert torch.equal(history.train.elbo, expected.train.elbo) and torch.equal(history.test.kl, expected.test.kl)
    with pytest.raises(ValueError, match="of another run"):
        fit(fresh(), few, epochs=5, checkpoint=path, progress=False)


def test_training_improves_on_the_best_independent_pixels(digits: Images) -> None:
    model = PlanarVAE(hidden=200)
    history = fit(model, digits, epochs=60, lr=3e-3, progress=False)
    p = to_float(digits.train).mean(0).clamp(1e-4, 1 - 1e-4)
    x = to_float(digits.test)
    independent = (x * p.log() + (1 - x) * (1 - p).log()).sum(1).mean()
    assert history.test.elbo[-1] > independent + 5
    assert history.train.elbo.shape == (60,) and history.train.elbo[-1] > history.train.elbo[0]


def test_history_holds_the_means_of_the_four_terms(few: Images) -> None:
    few = few._replace(test=torch.zeros_like(few.test))  # blank: nothing like the training images
    model = fresh()
    history = fit(model, few, epochs=20, lr=1e-2, progress=False)
    torch.manual_seed(1)
    means = mean_terms(model, few.test)
    assert abs(history.test.elbo[-1] - history.train.elbo[-1]) > 20
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
    monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trained again"))
    again, loaded = train_or_load(few, 2, hidden=20, progress=False)
    assert same(model, again) and torch.equal(history.train.elbo, loaded.train.elbo)
    assert capsys.readouterr().out == first and "few" in first
    assert [path.suffix for path in sorted(runs.iterdir())] == [".pt", ".lock"]
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


def test_the_code_version_sees_code_and_not_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = train._code_version()
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, **k: read(self, **k).replace('"""The planar', '# x\n"""A planar')
    )
    assert train._code_version() == before
    monkeypatch.setattr(Path, "read_text", lambda self, **k: read(self, **k).replace("a = (w * z)", "a = (w * w)"))
    assert train._code_version() != before


def test_another_data_set_of_the_same_name_is_another_run(few: Images, runs: Path, tmp_path: Path) -> None:
    model, _ = train_or_load(few, 1, hidden=20, progress=False)
    inverted = few._replace(train=255 - few.train)
    assert not same(model, train_or_load(inverted, 1, hidden=20, progress=False)[0])
    path = tmp_path / "run.pt"
    fit(fresh(), few, epochs=1, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="of another run"):
        fit(fresh(), inverted, epochs=1, checkpoint=path, progress=False)


def test_what_is_drawn_next_does_not_depend_on_training_or_loading(few: Images, runs: Path) -> None:
    drawn = []
    for _ in range(2):
        train_or_load(few, 1, hidden=20, progress=False)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK"])
def test_a_damaged_file_is_an_error_that_names_it(few: Images, runs: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.pt is damaged: delete it"):
        fit(fresh(), few, epochs=1, checkpoint=path, progress=False)
    train_or_load(few, 1, hidden=20, progress=False)
    (saved,) = runs.glob("*.pt")
    torch.save({"something": "else"}, saved)
    with pytest.raises(ValueError, match="is damaged: delete it"):
        train_or_load(few, 1, hidden=20, progress=False)


def test_train_or_load_goes_on_from_an_unfinished_run(few: Images, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saved = train._save, []

    def die_after_the_first(content: dict, target: Path) -> None:
        save(content, target)
        saved.append(Path(target).suffix)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_save", die_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        train_or_load(few, 3, hidden=20, progress=False)
    train_or_load(few, 3, hidden=20, progress=False)
    assert saved == [".unfinished"] * 3 + [".pt"]  # epoch 1, then 2 and 3: none was trained twice
    assert not list(runs.glob("*.unfinished"))


def test_a_double_model_is_trained_in_double(few: Images) -> None:
    model = fresh().double()
    history = fit(model, few, epochs=1, progress=False)
    assert model.heads.weight.dtype == torch.float64 and torch.isfinite(history.test.elbo).all()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    train._save({"a": 1}, path)
    with pytest.raises(AttributeError):
        train._save({"a": lambda: 0}, path)  # cannot be pickled
    assert torch.load(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


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
        fit(model, few, epochs=1, progress=False)


def test_budget_chooses_the_epochs(digits: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANAR_BUDGET", "full")
    full = epochs_for(digits)
    monkeypatch.delenv("PLANAR_BUDGET")
    assert epochs_for(digits) < full


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
        ({"checkpoint": "no/such/folder/run.pt"}, FileNotFoundError, "checkpoint must lie in an existing folder"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of"),
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
