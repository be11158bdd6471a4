"""The comparisons print what they should, and fail when they should; sources come without docstrings."""

import ast
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from planar_helpers import checks, elbo, planar
from planar_helpers.checks import compare, compare_mean, ladj_by_autograd, show_source, your_turn


def test_a_comparison_prints_its_bound_and_not_the_difference(capsys: pytest.CaptureFixture[str]) -> None:
    one = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    compare("z", one, one + 1e-14)
    compare("row", one[:1].expand(5, 2), one[0], within=1e-6)
    compare("number", np.array([2, 2]), 2, within=0)
    compare("infinity", torch.tensor([torch.inf, 1.0]), torch.tensor([torch.inf, 1.0]))
    assert capsys.readouterr().out.splitlines() == [
        "z: largest difference below 1e-12",
        "row: largest difference below 1e-06",
        "number: equal, bit for bit",
        "infinity: largest difference below 1e-12",
    ]


def test_a_comparison_that_fails_says_how_far_and_where() -> None:
    other = torch.zeros(3, 2)
    other[1, 0], other[2, 1] = 0.25, -0.5
    with pytest.raises(AssertionError, match=r"z: 2 of 6 entries differ by 1e-12 or more.* at \[2, 1\]: 0.0 and -0.5"):
        compare("z", torch.zeros(3, 2), other)
    with pytest.raises(AssertionError, match="by 1.0e-12"):
        compare("at the bound", 0.0, 1e-12)
    with pytest.raises(AssertionError, match="1 of 1 entries"):
        compare("double precision", 1.0, 1.0 + 1e-9)
    with pytest.raises(AssertionError):
        compare("not bit for bit", 1.0, 1.0 + 1e-15, within=0)


def test_an_answer_that_is_not_there_is_no_failure_and_a_wrong_one_is(capsys: pytest.CaptureFixture[str]) -> None:
    right = torch.tensor([1.0, 2.0], dtype=torch.float64)
    your_turn("area", None, right)
    your_turn("area", right + 1e-12, right)
    assert capsys.readouterr().out.splitlines() == [
        "area: not answered yet",
        "area: right: largest difference below 1e-09",
    ]
    for wrong in (-right, right + 1e-8, right * torch.nan):
        with pytest.raises(AssertionError, match="area: right: .* entries differ by 1e-09 or more"):
            your_turn("area", wrong, right)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_never_agrees(bad: float) -> None:
    for one, other in ((bad, 1.0), (1.0, bad), (bad, -bad)):
        with pytest.raises(AssertionError):
            compare("x", torch.tensor([1.0, one]), torch.tensor([1.0, other]), within=1e300)


def test_shapes_that_would_broadcast_into_something_else_are_refused() -> None:
    for one, other in (((3, 1), (3,)), ((3,), (3, 1)), ((2,), (5, 2)), ((), (2,))):
        with pytest.raises(ValueError, match="other must have the shape of one"):
            compare("x", torch.zeros(one), torch.zeros(other))
    with pytest.raises(ValueError, match="at least one number"):
        compare("x", torch.zeros(0), 0.0)
    for bad in ("1", None, torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="other must be a tensor"):
            compare("x", torch.zeros(2), bad)


def test_a_mean_is_compared_within_its_error_bar(capsys: pytest.CaptureFixture[str]) -> None:
    draws = torch.tensor([1.0, 3.0] * 50)
    compare_mean("E", draws, 2.3)  # the error is 0.1005
    assert capsys.readouterr().out == "E: Monte Carlo 2.000 ± 0.101, exact 2.300, within 4 standard errors\n"
    for exact in (2.41, 1.59):
        with pytest.raises(AssertionError, match="off by 4.1 standard errors"):
            compare_mean("E", draws, exact)
    compare_mean("E", draws, 2.41, errors=5)
    assert "within 5 standard errors" in capsys.readouterr().out
    compare_mean("no noise", torch.full((10,), 0.1, dtype=torch.float64), 0.1)
    for wrong, off in ((torch.full((10,), 0.1), 0.2), (torch.tensor([0.0, float("nan")]), 0.0)):
        with pytest.raises(AssertionError, match="standard errors"):
            compare_mean("E", wrong, off)
    for shape in ((1,), (0,), (5, 2), ()):
        with pytest.raises(ValueError, match="draws must be"):
            compare_mean("E", torch.zeros(shape), 0.0)
    with pytest.raises(ValueError, match="exact must be one number"):
        compare_mean("E", draws, torch.zeros(2))


def test_the_log_determinant_by_autograd_is_that_of_a_matrix_known_by_hand() -> None:
    A = torch.tensor([[2.0, 1.0], [0.0, -3.0]], dtype=torch.float64)  # det = −6
    z, scale = torch.rand(4, 2, dtype=torch.float64), torch.tensor([1.0, 2.0, -3.0, 0.5], dtype=torch.float64)
    ladj = ladj_by_autograd(lambda z, a, b: a * (A @ z) + b, z, scale, z)
    compare("ladj", ladj, torch.tensor(6.0).log() + 2 * scale.abs().log(), within=1e-6)
    compare("a bend", ladj_by_autograd(torch.exp, z), z.sum(-1), within=1e-14)  # the Jacobian is diag(e^z)
    assert ladj_by_autograd(torch.exp, z.float()).dtype == torch.float32


def test_what_has_no_square_jacobian_is_refused() -> None:
    z = torch.ones(3, 2)
    for shape in ((2,), (0, 2), (3, 0)):
        with pytest.raises(ValueError, match=r"z must be \(N, D\) with N ≥ 1 and D ≥ 1"):
            ladj_by_autograd(torch.exp, torch.ones(shape))
    for f in (torch.sum, lambda z: (z, z), lambda z: z[:1]):
        with pytest.raises(ValueError, match=r"f must return one point \(2,\)"):
            ladj_by_autograd(f, z)
    with pytest.raises(ValueError, match=r"parameters\[1\] must be \(3, ...\)"):
        ladj_by_autograd(lambda z, a, b: z, z, z, torch.ones(2))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", None])
def test_a_console_that_lacks_a_letter_shows_the_rest(monkeypatch: pytest.MonkeyPatch, encoding: str | None) -> None:
    written = io.BytesIO()
    console = io.TextIOWrapper(written, encoding=encoding, newline="\n") if encoding else None  # None: no console
    monkeypatch.setattr(sys, "stdout", console)
    compare("û and −x²", 1.0, 1.0)
    compare_mean("E over û", torch.tensor([0.0, 1.0]), 0.5)
    show_source(planar.constrain_u)
    if console:
        console.flush()
        text = written.getvalue().decode(encoding)
        assert (
            "largest difference below 1e-12\n" in text and "exact 0.500, within" in text and "def constrain_u" in text
        )
        assert ("û" in text) == (encoding != "ascii") and ("?" in text) == (encoding != "utf-8")


class Shown:
    """A docstring of a class."""

    limit = 3  # a comment that stays

    def method(self) -> int:
        """A docstring

        of three lines.
        """
        # a comment
        return self.limit

    def empty(self) -> None:
        """Nothing but this."""


def test_a_source_is_shown_without_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    show_source(Shown, Shown.method)
    text = capsys.readouterr().out
    assert '"""' not in text and "docstring" not in text and "three lines" not in text
    assert text.startswith("class Shown:\n    limit = 3  # a comment that stays\n")
    assert "        ...\n\ndef method(self) -> int:\n    # a comment\n    return self.limit\n" in text
    show_source(planar.planar_chain, elbo.ElboTerms)
    text = capsys.readouterr().out
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert ast.get_docstring(node) is None
    assert "def planar_chain(" in text and "class ElboTerms" in text
    with pytest.raises(TypeError, match="things must be functions, classes or modules, got 3"):
        show_source(3)


def test_the_oracle_imports_nothing_that_it_checks() -> None:
    source = Path(checks.__file__).read_text(encoding="utf-8")
    assert "planar_helpers" not in source.replace("planar_helpers import checks", "")


def test_an_animation_is_shown_with_its_frames_and_their_times(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[100, 200, 300])
    shown = Image.open(io.BytesIO(checks.show_animation(tmp_path / "a.gif")._repr_png_()))
    assert shown.format == "PNG"
    seen = [(frame.convert("RGB").getpixel((3, 3)), frame.info["duration"]) for frame in ImageSequence.Iterator(shown)]
    assert seen == [((255, 0, 0), 100), ((0, 128, 0), 200), ((0, 0, 255), 300)]
    with pytest.raises(OSError, match=r"b\.gif"):
        checks.show_animation(tmp_path / "b.gif")
