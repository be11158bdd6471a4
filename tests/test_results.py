"""Where figures and numbers go, that they are written whole, and that a stored number would notice an exchange."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from planar_helpers import plots, results, run

plt.switch_backend("Agg")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
import restate  # noqa: E402  (scripts, not a package)
import stored  # noqa: E402

STORED = sorted((ROOT / "figures" / "results").glob("[0-9][0-9]_*.json"))


@pytest.fixture(autouse=True)
def _results_are_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLANAR_RESULTS", raising=False)
    monkeypatch.delenv("PLANAR_BUDGET", raising=False)


def test_only_full_mnist_figures_and_constant_ones_reach_the_gallery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLANAR_FIGURES")
    for set_budget, data, budget_matters, gallery in (
        ("quick", None, False, True),
        ("full", None, False, True),
        ("quick", None, True, False),
        ("full", None, True, True),
        ("quick", "MNIST", False, False),
        ("full", "MNIST", False, True),
        ("full", "MNIST", True, True),
        ("full", "digits", False, False),
    ):
        monkeypatch.setenv("PLANAR_BUDGET", set_budget)
        path = results.figure_path("x.png", data, budget_matters)
        assert path == (ROOT / "figures" if gallery else ROOT / "build" / "figures") / "x.png"


def test_a_figure_is_saved_whole_and_twice_the_same() -> None:
    contents = []
    for _ in range(2):
        fig, ax = plt.subplots()
        ax.plot([0, 1])
        contents.append(results.save_figure(fig, "99_line").read_bytes())
        plt.close(fig)
    assert contents[0] == contents[1] and contents[0].startswith(b"\x89PNG") and b"Software" not in contents[0]
    fig, ax = plt.subplots(figsize=(1, 1))
    (line,) = ax.plot([0, 1])
    animation = plots.animate(lambda frame: line.set_ydata([0, frame]), 3, fig)
    path = results.save_figure(animation, "99_moving", fps=5)
    assert path.suffix == ".gif" and path.read_bytes().startswith(b"GIF")
    plt.close(fig)
    assert {p.name for p in path.parent.iterdir()} == {"99_line.png", "99_moving.gif"}
    with pytest.raises(TypeError, match="fig must be a Figure"):
        results.save_figure(ax, "99_axes")


def test_a_failed_save_leaves_nothing_behind() -> None:
    class Broken(plt.Figure):
        def savefig(self, path: Path, **_: object) -> None:
            Path(path).write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        results.save_figure(Broken(), "99_broken")
    assert list(results.figure_path("x").parent.iterdir()) == []


def test_numbers_are_kept_with_their_tolerance_and_error() -> None:
    numbers = {"ELBO": (-1.23456, 0.5), "gap": (torch.tensor(2.0), 0.1, 0.012345)}
    path = results.save_numbers("07_x", numbers, "MNIST", seed=0)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["numbers"] == {
        "ELBO": {"value": -1.23456, "tolerance": 0.5},
        "gap": {"value": 2.0, "tolerance": 0.1, "error": 0.012345},
    }
    assert content["settings"]["data"] == "MNIST" and content["settings"]["seed"] == 0
    assert content["settings"]["budget"] == "quick"
    for bad in (
        (float("nan"), 1.0),
        (1.0, 0.0),
        (1.0, -1.0),
        (1.0, float("inf")),
        (1.0, 1.0, -0.1),
        (1.0, 1.0, float("nan")),
    ):
        with pytest.raises(ValueError, match="'ELBO' must be finite"):
            results.save_numbers("07_x", {"ELBO": bad}, "MNIST")
    for bad in ((1.0,), (1.0, 1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match="'ELBO' must be .value, tolerance"):
            results.save_numbers("07_x", {"ELBO": bad}, "MNIST")
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert [file.name for file in path.parent.iterdir()] == ["07_x.json"]


def test_numbers_go_where_figures_go_unless_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = []
    monkeypatch.setattr(results, "replacing", lambda path: written.append(path) or run.replacing(tmp_path / "x.json"))
    monkeypatch.delenv("PLANAR_FIGURES")
    for set_budget, data in (
        ("full", "MNIST"),
        ("full", None),
        ("quick", "MNIST"),
        ("quick", None),
        ("full", "digits"),
    ):
        monkeypatch.setenv("PLANAR_BUDGET", set_budget)
        results.save_numbers("07_x", {}, data)
    committed, other = ROOT / "figures" / "results" / "07_x.json", ROOT / "build" / "figures" / "results" / "07_x.json"
    assert written == [committed, committed, other, other, other]
    for name, place in (("PLANAR_FIGURES", "f/results"), ("PLANAR_RESULTS", "r")):
        monkeypatch.setenv(name, str(tmp_path / place.split("/")[0]))
        results.save_numbers("07_x", {}, "digits")
        assert written[-1] == tmp_path / place / "07_x.json"


@pytest.mark.parametrize("name", ["../escape", "/absolute", "01_a/b", "", "01_x.png", "7_x", "01 x", None])
def test_a_name_that_is_no_stem_is_refused(name: str | None) -> None:
    with pytest.raises(ValueError, match="name must be a stem"):
        results.save_figure(plt.Figure(), name)
    with pytest.raises(ValueError, match="name must be a stem"):
        results.save_numbers(name, {}, "MNIST")


def test_a_rerun_is_told_which_numbers_it_missed() -> None:
    before = {"a": (1.0, 0.1), "b": (2.0, 0.1), "c": (3.0, 0.1)}
    lines, missed = stored.compare_numbers(before, {"a": (1.05, 0.1), "b": (2.2, 9.0)})
    assert "2 of 3 stored numbers made again, 1 outside" in lines[0] and missed == 1
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["b"]
    lines, missed = stored.compare_numbers(before, {})
    assert "0 of 3 stored numbers made again" in lines[0] and missed == 0, "nothing made again is no agreement"
    assert stored.compare_numbers(before, {"a": (float("nan"), 0.1)})[1] == 1


def test_only_what_a_run_wrote_counts_as_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLANAR_RESULTS", str(tmp_path))
    path = results.save_numbers("07_x", {"a": (1.0, 0.1)}, None)
    (tmp_path / "minutes.json").write_text("{}", encoding="utf-8")
    written = path.stat().st_mtime
    assert stored.stored_numbers(since=written) == {"07_x: a": (1.0, 0.1)}
    assert stored.stored_numbers(since=written + 1) == {}


def test_the_committed_values_are_compared_whatever_lies_in_the_folder(tmp_path: Path) -> None:
    content = {"settings": {}, "numbers": {"a": {"value": 1.0, "tolerance": 0.1}}}
    folder = tmp_path / "a b" / "results"
    folder.mkdir(parents=True)
    (folder / "07_x.json").write_text(json.dumps(content), encoding="utf-8")
    assert stored.committed_numbers(folder) == (
        {"07_x: a": (1.0, 0.1)},
        "the files as they lay before (no commit found)",
    )
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "numbers"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    content["numbers"]["a"]["value"] = 5.0
    (folder / "07_x.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "08_new.json").write_text(json.dumps(content), encoding="utf-8")
    subprocess.run([*git, "add", "."], check=True, capture_output=True)
    assert stored.committed_numbers(folder) == ({"07_x: a": (1.0, 0.1)}, "the committed values")


def exchanged(numbers: dict[str, dict[str, float]], one: str, other: str) -> dict[str, float]:
    """What a run would store that took one arm for the other: name -> value, where it can be told."""
    found = {}
    for name in numbers:
        head, _, label = name.rpartition(": ")
        parts = [[{one: other, other: one}.get(arm, arm) for arm in part.split(" minus ")] for part in head.split(", ")]
        swapped = ", ".join(" minus ".join(arms) for arms in parts)
        turned = ", ".join(" minus ".join(reversed(arms)) for arms in parts)
        if f"{swapped}: {label}" in numbers:
            found[name] = numbers[f"{swapped}: {label}"]["value"]
        elif f"{turned}: {label}" in numbers:
            found[name] = -numbers[f"{turned}: {label}"]["value"]
    return found


def arms(numbers: dict[str, dict[str, float]]) -> set[tuple[str, str]]:
    """Each pair of arms that stand in one place of the names; a training's marks ("30 epochs") are no arms."""
    pairs = set()
    heads = [name.rpartition(": ")[0].split(", ") for name in numbers if " minus " not in name]
    for a, b in itertools.combinations(heads, 2):
        differ = [(x, y) for x, y in zip(a, b, strict=False) if x != y]
        if len(a) == len(b) and len(differ) == 1 and not any(re.fullmatch(r"\d+ epochs", x) for x in differ[0]):
            pairs.add(tuple(sorted(differ[0])))
    return pairs


def missed(numbers: dict[str, dict[str, float]], one: str, other: str) -> list[str]:
    return [
        name
        for name, value in exchanged(numbers, one, other).items()
        if abs(value - numbers[name]["value"]) > numbers[name]["tolerance"]
    ]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_two_arms_cannot_be_exchanged_unnoticed(path: Path) -> None:
    numbers = json.loads(path.read_text(encoding="utf-8"))["numbers"]
    pairs = arms(numbers)
    assert pairs
    blind = [pair for pair in sorted(pairs) if not missed(numbers, *pair)]
    assert not blind, f"{path.stem}: these could be exchanged with every number inside its tolerance: {blind}"


def test_the_exchange_knows_differences() -> None:
    wide = {"K = 0: gap": {"value": 9.0, "tolerance": 4.0}, "K = 3: gap": {"value": 6.0, "tolerance": 4.0}}
    assert arms(wide) == {("K = 0", "K = 3")} and missed(wide, "K = 0", "K = 3") == []
    difference = {"K = 3 minus K = 0: gap": {"value": -3.0, "tolerance": 4.0}}
    assert missed(wide | difference, "K = 0", "K = 3") == ["K = 3 minus K = 0: gap"]
    split = {f"test, {name}": entry for name, entry in (wide | difference).items()}
    assert missed(split, "K = 0", "K = 3") == ["test, K = 3 minus K = 0: gap"]


def test_the_readmes_state_the_stored_numbers() -> None:
    for path in restate.READMES:
        assert restate.restated(path) == path.read_text(encoding="utf-8"), f"{path.name}: run make readme"


@pytest.mark.parametrize("path", restate.series(), ids=lambda path: path.stem)
def test_the_notebooks_state_the_recorded_minutes(path: Path) -> None:
    assert restate.restated(path) == path.read_text(encoding="utf-8"), f"{path.name}: run make readme"


def test_no_result_in_the_readmes_is_written_by_hand() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Results$(.*?)^## ", readme, flags=re.M | re.S)[1]
    assert len(restate.BLOCK.findall(section)) >= 5
    assert re.findall(restate.DECIMAL, restate.BLOCK.sub("", section)) == []
    gallery = restate.BLOCK.sub("", (ROOT / "figures" / "README.md").read_text(encoding="utf-8"))
    settings = {"0.1", "0.01", "1.5", "−1.5"}  # of the series' pages 3 and 5, of the plane of the post
    assert set(re.findall(restate.DECIMAL, gallery)) <= settings


NUMBERS = {
    "K = 0: gap": {"value": 9.304, "tolerance": 1.0},
    "K = 3: gap": {"value": -0.004, "tolerance": 1.0, "error": 0.126},
    "test, K = 0: gap": {"value": 1.0, "tolerance": 1.0},
    "test, K = 3: gap": {"value": 3.5, "tolerance": 1.0},
}


def test_a_table_and_a_paragraph_are_filled_from_the_stored_numbers() -> None:
    turned = "test, K = 0 minus K = 3: gap"
    text = f"""Before 1.23.

<!-- numbers from 07_x, 2 digits: {{row}}: {{column}} | K = 0; K = 3 | gap -->
| K | gap |
|---|---|
| 0 (plain) | 1 |
| 3 | 2 ± 3 |

<!-- numbers from 07_x, in this order: |K = 3 minus K = 0: gap|; test, K = 3 minus K = 0: gap; {turned} -->
The gap is 1.0 smaller, of 100 images, and 0.00,
then −7.1.

<!-- numbers from 08_none, in this order: a -->
Left at 5.5."""
    filled = restate.restate_numbers(text, lambda stem: {"numbers": NUMBERS} if stem == "07_x" else None)
    assert "| 0 (plain) | 9.30 |\n| 3 | 0.00 ± 0.13 |\n" in filled and filled.startswith("Before 1.23.\n")
    assert "The gap is 9.3 smaller, of 100 images, and 2.50,\nthen −2.5.\n" in filled and filled.endswith(
        "Left at 5.5."
    )
    assert restate.restate_numbers(filled, lambda stem: {"numbers": NUMBERS} if stem == "07_x" else None) == filled
    for wrong in (
        "2 digits: {row}: {column} | K = 0; K = 3; K = 5 | gap",
        "2 digits: {row}: {column} | K = 0; K = 9 | gap",
    ):
        broken = f"<!-- numbers from 07_x, {wrong} -->\n| K | gap |\n|---|---|\n| 0 | 1 |\n| 3 | 2 |"
        with pytest.raises(KeyError, match="its comment names 3|has no number named 'K = 9: gap'"):
            restate.restate_numbers(broken, lambda _: {"numbers": NUMBERS})
    with pytest.raises(KeyError, match="has 2 decimals, its comment names 1"):
        restate.restate_numbers(
            "<!-- numbers from 07_x, in this order: a -->\n1.5 and 2.5", lambda _: {"numbers": NUMBERS}
        )


TIMED = {
    budget: {
        "data": "MNIST", "processor": "P", "cores": 2, "jobs": 2, "date": "2026-01-01", "total": total,
        "notebooks": {"00_start_here": 0.04 * total, "08_exact_posterior": 4 * total},
    }
    for budget, total in (("quick", 1.0), ("full", 12.0))
}  # fmt: skip


def test_the_minutes_are_stated_in_one_sentence_one_column_one_line() -> None:
    reading = {"00_start_here": 12, "08_exact_posterior": 20, "01_other": 7}
    computing = "of computing on two cores, {} at the quick budget, {} at the full one. Most of it training."
    opener = f"# 08\n\n**Minutes:** 3 of reading; {computing.format(1, 99)}"
    stated = restate.restate_minutes(opener, "08_exact_posterior", TIMED, reading)
    assert f"**Minutes:** 20 of reading; {computing.format('4.0', 48)}" in stated
    assert restate.restate_minutes(opener, "01_other", TIMED, reading) == opener
    assert restate.restate_minutes(opener, "08_exact_posterior", None, reading) == opener
    for head, cells in (
        ("minutes, quick / full", "0.1 / 0.5"),
        ("minutes, quick", "0.1"),
        ("reading | minutes, quick", "12 | 0.1"),
    ):
        blank = " | ".join("?" for _ in head.split("|"))
        rows = "| [00](00_start_here.ipynb) | {} | x |\n" + f"| no link | {blank} | x |"
        table = f"| notebook | {head} | figure |\n|---|---|---|\n{rows.format(blank)}"
        filled = restate.restate_minutes(table, None, TIMED, reading)
        assert rows.format(cells) in filled
    line = restate.restate_minutes("a\n*Minutes: old.*\nb", None, TIMED, reading)
    assert "1.0 in all at the quick budget" in line and "12 in all at the full" in line and line.endswith("*\nb")


def test_reading_is_counted_in_words_equations_and_lines_and_folded_answers_are_not() -> None:
    words = {"cell_type": "markdown", "source": ["word " * 360, "$$\n x = 1 \n$$"]}
    folded = {"cell_type": "markdown", "source": ["<details>\n", "word " * 900, "\n$$ y $$\n</details>"]}
    code = {"cell_type": "code", "source": ["a = 1\n", "\n", "b = 2"]}
    assert restate.reading_minutes([words]) == 3 and restate.reading_minutes([words, folded]) == 3
    assert restate.reading_minutes([words, *[code] * 10]) == round(3 + 20 * restate.SECONDS["line"] / 60)


def test_minutes_are_recorded_with_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLANAR_RESULTS", str(tmp_path))
    monkeypatch.setattr("planar_helpers.data.load_images", lambda: type("I", (), {"name": "digits"}))
    restate.record("quick", {"00_a": 1.0, "01_b": 2.0}, 3.0, jobs=2)
    restate.record("quick", {"01_b": 0.5}, 0.5, jobs=2)
    timed = json.loads((tmp_path / "minutes.json").read_text(encoding="utf-8"))["quick"]
    assert timed["notebooks"] == {"00_a": 1.0, "01_b": 0.5} and timed["total"] == 3.0, "a part is no total"
    assert timed["data"] == "digits" and timed["cores"] >= 1 and timed["processor"] and timed["jobs"] == 2
    restate.record("full", {"00_a": 1.0, "01_b": 2.0}, 3.1, jobs=1)
    restate.record("full", {"02_c": 0.5}, 0.6, jobs=1)
    timed = json.loads((tmp_path / "minutes.json").read_text(encoding="utf-8"))["full"]
    assert timed["total"] == 3.5, "one at a time, a new notebook adds its own minutes"
