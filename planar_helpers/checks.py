"""Two routes to one number, compared out loud; and the source of a function, printed.

Nothing that is checked is imported here: a check that shares the code it checks agrees with its mistakes.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compare(what: str, one: Tensor | float, other: Tensor | float, within: float = 1e-12) -> None:
    """Assert that two routes agree in every entry, and print the bound that their largest difference stays below.

    `other` may be one number, or anything that broadcasts to the shape of `one`. The printed line names the bound and
    not the difference, so it is the same on every machine. `within=0` asks for equality, bit for bit.

    Raises AssertionError, saying how far apart they are and where, if they differ by `within` or more, or if an entry
    is not a number; ValueError if there is nothing to compare, or the shapes do not fit.

    >>> compare("(a + b)² and a² + 2ab + b²", 1.1**2, 1 + 0.2 + 0.01)
    (a + b)² and a² + 2ab + b²: largest difference below 1e-12
    """
    a, b = _double(one, "one"), _double(other, "other")
    try:
        b = b.expand(a.shape)
    except RuntimeError:
        raise ValueError(
            f"{what}: other must have the shape of one, {tuple(a.shape)}, or broadcast to it, got {tuple(b.shape)}"
        ) from None
    if a.numel() == 0:
        raise ValueError(f"{what}: one must hold at least one number to compare, got shape {tuple(a.shape)}")
    difference = torch.where(a == b, 0.0, (a - b).abs())  # two infinities of one sign are equal
    bad = ~(difference < within) if within > 0 else ~(difference == 0)  # a NaN is no agreement
    if bad.any():
        worst = torch.nan_to_num(difference, nan=torch.inf).argmax()
        place = [int(i) for i in torch.unravel_index(worst, a.shape)] if a.shape else "the number itself"
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {a.numel()} entries differ by {within:.0e} or more; the furthest apart, at "
            f"{place}: {a.flatten()[worst].item()!r} and {b.flatten()[worst].item()!r}, "
            f"by {difference.flatten()[worst].item():.1e}"
        )
    _say(f"{what}: " + (f"largest difference below {within:.0e}" if within > 0 else "equal, bit for bit"))


def your_turn(what: str, answer: Tensor | None, right: Tensor | float, within: float = 1e-9) -> None:
    """Compare a reader's answer with what is right, as `compare` does, or say that there is none yet.

    An answer of None is no failure: the notebook runs to its end before the reader has written anything. Raises as
    `compare` for any other answer.

    >>> your_turn("area", None, 2.0)
    area: not answered yet
    """
    if answer is None:
        _say(f"{what}: not answered yet")
    else:
        compare(f"{what}: right", answer, right, within)


def compare_mean(what: str, draws: Tensor, exact: Tensor | float, errors: float = 4) -> None:
    """Assert that the mean of independent draws (N,) is an exact value, within so many standard errors; print both.

    The standard error is the sample's standard deviation / √N.

    Raises AssertionError if the mean is further off, or not a number; ValueError if draws are not (N,) with N ≥ 2, or
    `exact` is not one number.
    """
    values, value = _double(draws, "draws"), _double(exact, "exact")
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(f"{what}: draws must be (N,) with N ≥ 2, got shape {tuple(values.shape)}")
    if value.numel() != 1:
        raise ValueError(f"{what}: exact must be one number, got shape {tuple(value.shape)}")
    mean, error = values.mean().item(), (values.std() / len(values) ** 0.5).item()
    line = f"{what}: Monte Carlo {mean:.3f} ± {error:.3f}, exact {value.item():.3f}"
    rounding = 1e-12 * (1 + abs(value.item()))  # draws that are all equal have no error of their own
    if not abs(mean - value.item()) < errors * error + rounding:
        off = abs(mean - value.item()) / error if error > 0 else float("inf")
        raise AssertionError(f"{line}, off by {off:.1f} standard errors")
    _say(f"{line}, within {errors:g} standard errors")


def ladj_by_autograd(f: Callable[..., Tensor], z: Tensor, *parameters: Tensor) -> Tensor:
    """Return log abs det ∂f/∂z (N,) at each of N points: autograd's full Jacobian, and elimination (slogdet).

    f maps one point z (D,), with that point's own parameters, to one point (D,); z is (N, D), and each of the
    parameters (N, ...). It takes D backward passes and D³ operations a point, and knows no formula.

    Raises ValueError if z is not (N, D), if a parameter does not come N times, or if f returns no point (D,).
    Derived in: notebooks/01_change_of_variables, section "What does a bent map do to area, and to a density?".

    >>> ladj_by_autograd(lambda z, a: a * z, torch.ones(2, 3), torch.tensor([1.0, -1.0]))
    tensor([0., 0.])
    """
    if z.dim() != 2 or z.numel() == 0:
        raise ValueError(f"z must be (N, D) with N ≥ 1 and D ≥ 1, got shape {tuple(z.shape)}")
    for i, parameter in enumerate(parameters):
        if parameter.shape[:1] != z.shape[:1]:
            raise ValueError(
                f"parameters[{i}] must be ({len(z)}, ...), one a point, got shape {tuple(parameter.shape)}"
            )
    J = torch.func.vmap(torch.func.jacrev(f))(z, *parameters)  # (N, D, D): row i is the gradient of output i
    if not isinstance(J, Tensor) or J.shape != (*z.shape, z.shape[1]):
        raise ValueError(f"f must return one point ({z.shape[1]},) for one point, and nothing else")
    return torch.linalg.slogdet(J).logabsdet


def show_source(*things: Any) -> None:
    """Print the source of functions, classes or modules, without their docstrings.

    Raises TypeError for a thing that has no source of its own.
    """
    sources = []
    for thing in things:
        function: Any = thing.fget if isinstance(thing, property) else thing
        try:
            sources.append(_without_docstrings(inspect.getsource(inspect.unwrap(function))))
        except TypeError:
            raise TypeError(f"things must be functions, classes or modules, got {thing!r}") from None
    _say("\n\n".join(sources))


def _say(text: str) -> None:
    """Print; what the console cannot show (± in ASCII, û in an old Windows one) comes as a question mark."""
    if sys.stdout is not None and not sys.stdout.closed:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, errors="replace").decode(encoding))


def _double(values: Tensor | float, name: str) -> Tensor:
    """The values as a double tensor on the CPU, free of gradients."""
    try:
        tensor = values.detach() if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)
        if not tensor.is_complex():
            return tensor.to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} must be a tensor, an array or a number, real, got {type(values).__name__}")


def _without_docstrings(source: str) -> str:
    source = textwrap.dedent(source)
    lines: list[str | None] = list(source.splitlines())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node) is None or node.body[0].lineno == getattr(node, "lineno", 0):
                continue
            doc = node.body[0]
            last = doc.end_lineno or doc.lineno
            alone = len(node.body) == 1
            lines[doc.lineno - 1 : last] = [" " * doc.col_offset + "..." if alone else None] + [None] * (
                last - doc.lineno
            )
            if last < len(lines) and not (lines[last] or "").strip():  # the blank line that parted it from the code
                lines[last] = None
    return "\n".join(line for line in lines if line is not None).strip()
