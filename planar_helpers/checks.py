"""Two routes to one number, compared out loud; the source of a function, printed; the exercises, checked.

Nothing that is checked is imported here: a check that shares the code it checks agrees with its mistakes.
"""

import ast
import inspect
import io
import math
import numbers
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageSequence
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


class Animation(NamedTuple):
    """An animated PNG, which a cell shows as it shows any picture."""

    png: bytes

    def __repr__(self) -> str:
        return f"an animation, {len(self.png) / 1000:.0f} kB"

    def _repr_png_(self) -> bytes:
        return self.png


def show_animation(path: str | Path) -> Animation:
    """Return a GIF as an animated PNG of 128 colours, for a cell to show: every viewer takes it for a plain picture.

    Each frame is shown as long as in the GIF. Raises OSError for a file that is not there, or is no picture.
    """
    with Image.open(path) as gif:
        frames = [(frame.convert("RGB"), frame.info["duration"]) for frame in ImageSequence.Iterator(gif)]
    strip = Image.new("RGB", (sum(frame.width for frame, _ in frames), frames[0][0].height))
    for i, (frame, _) in enumerate(frames):
        strip.paste(frame, (i * frame.width, 0))
    colours = strip.quantize(128)  # one palette for all
    first, *rest = (frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame, _ in frames)
    written = io.BytesIO()
    first.save(written, "PNG", save_all=True, append_images=rest, duration=[shown for _, shown in frames], loop=0)
    return Animation(written.getvalue())


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


class Exercise(NamedTuple):
    """What an answer is held against: trials for a seed, the right function, and known slips by their sentence."""

    trials: Callable[["Draw"], list[tuple[Any, ...]]]
    right: Callable[..., Any]
    slips: dict[str, Callable[..., Any]]
    returns: tuple[str, ...]
    within: float = 1e-9
    evidence: Callable[[tuple[Any, ...], Tensor], str] | None = None
    package: tuple[str, ...] = ()  # functions of the package that the answer may call
    about: Callable[[tuple[Any, ...]], str] | None = None  # what sets a trial apart, for one that fails


class Wrong(AssertionError):
    """An answer that is not right; the message says why."""

    def _render_traceback_(self) -> list[str]:
        return [f"Not right yet. {self}"]  # IPython shows this in the place of a traceback


class Draw:
    """Random numbers of one seed, in float64: draw(2, 3) is normal, of shape (2, 3)."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        """Return normal numbers of this shape."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers in [0, 1) of this shape."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)


def check(name: str, answer: Any, seed: int = 0) -> None:
    """Hold an answer to an exercise of notebooks/assignments against an oracle, and say what is wrong with it.

    Random inputs in float64. An answer that agrees with a known slip is told which. The sentence names the largest
    disagreement and where it is.

    Raises Wrong, an AssertionError, unless the answer is right; ValueError for a name that is no exercise.
    """
    if name not in EXERCISES:
        raise ValueError(f"name must be one of {', '.join(EXERCISES)}, got {name!r}")
    exercise = EXERCISES[name]
    if not callable(answer):
        raise Wrong(f"{name}: hand in the function itself, check({name!r}, function), not {type(answer).__name__}.")
    if isinstance(exercise, Exercise):
        _say(f"{name}: right. {_held(name, exercise, answer, seed)}")
    else:
        _say(f"{name}: right. {exercise(_named(name, answer), Draw(seed))}")


def _held(name: str, exercise: Exercise, answer: Callable[..., Any], seed: int) -> str:
    trials = exercise.trials(Draw(seed))
    found = [_call(name, answer, trial, exercise.package) for trial in trials]
    right = [_tuple(exercise.right(*_copy(trial))) for trial in trials]
    bad = next((i for i in range(len(trials)) if not _agree(found[i], right[i], exercise.within)), None)
    if bad is None:
        return f"{len(trials)} trials, no disagreement above {exercise.within:.0e}."
    for sentence, slip in exercise.slips.items():
        if all(_same_as_slip(f, slip, trial, exercise.within) for f, trial in zip(found, trials, strict=True)):
            evidence = "."
            if exercise.evidence is not None:
                numbers = (exercise.evidence(trial, f[0]) for trial, f in zip(trials, found, strict=True))
                evidence = next((f": {text}." for text in numbers if text), ".")
            raise Wrong(f"{name}: this is {sentence}{evidence}")
    for trial, values, wanted in zip(trials, found, right, strict=True):
        _form(name, exercise, trial, values, wanted)
    first, many = found[0], len(trials) > 1
    if (
        many
        and all(_agree(found[i], first, 1e-12) for i in range(1, len(trials)))
        and not _agree(right[0], right[1], 1e-6)
    ):
        raise Wrong(f"{name}: the answer does not depend on the input: it was the same in {len(trials)} trials.")
    if not _agree(_call(name, answer, trials[bad], exercise.package), found[bad], 1e-12):
        raise Wrong(f"{name}: two calls with the same arguments give two answers: draw no random numbers of your own.")
    which = f"trial {bad + 1} of {len(trials)}" + (f", {exercise.about(trials[bad])}" if exercise.about else "")
    which += "; those before it agree" if bad else ""
    raise Wrong(f"{name}: {_furthest(exercise, found[bad], right[bad])} ({which}).")


def _call(name: str, answer: Callable[..., Any], trial: tuple[Any, ...], allowed: tuple[str, ...] = ()) -> tuple:
    """Return the answer's values as a tuple, each free of gradients, or say in a sentence why there are none."""
    given = _copy(trial)
    try:
        values, called = watched(answer, given)
    except Exception as error:  # noqa: BLE001  (whatever a student's code raises is answered in a sentence)
        said = str(error).strip().split("\n")[0].rstrip(".:")
        if isinstance(error, NotImplementedError) and not said:  # torch raises it, too, with a text
            raise Wrong(f"{name}: not written yet.") from None
        shapes = f" The arguments have the shapes {_shapes(trial)}." if isinstance(error, RuntimeError) else ""
        raise Wrong(f"{name}: your code raised {type(error).__name__}: {said}{_line_of(error)}.{shapes}") from None
    if called - set(allowed):
        names = ", ".join(sorted(called - set(allowed)))
        raise Wrong(f"{name}: this calls the package ({names}). Write the formula yourself.")
    for i, (mine, yours) in enumerate(zip(trial, given, strict=True)):
        if isinstance(mine, Tensor) and not torch.equal(mine, yours):
            raise Wrong(f"{name}: your code changed its argument number {i + 1} in place. Work on a copy.")
    return tuple(_detached(value) for value in _tuple(values))


def _detached(value: Any) -> Any:
    """A tensor free of gradients; a plain number as a tensor ()."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):  # NumPy's numbers are Real
        return torch.tensor(float(value), dtype=torch.float64)
    return value.detach() if isinstance(value, Tensor) else value


def watched(answer: Callable[..., Any], given: tuple[Any, ...]) -> tuple[Any, set[str]]:
    """Return answer(*given), and the names of the package's functions that it called itself.

    An answer that runs in another process, as when it is graded, keeps them in its attribute `called`.
    """
    called: set[str] = set()

    def watch(frame: Any, event: str, _: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith(f"{__package__}.") and module != __name__:
            caller = frame.f_back.f_globals.get("__name__", "") if frame.f_back else ""
            if caller == __name__ or not caller.startswith(f"{__package__}."):
                called.add(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        values = answer(*given)
    finally:
        sys.setprofile(before)
    return values, called | set(getattr(answer, "called", ()))


def _shapes(trial: tuple[Any, ...]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in trial if isinstance(t, Tensor))


def _line_of(error: BaseException) -> str:
    trace, line = error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "__main__":
            line = f" (line {trace.tb_lineno} of your cell)"
        trace = trace.tb_next
    return line


def _form(name: str, exercise: Exercise, trial: tuple[Any, ...], values: tuple, wanted: tuple) -> None:
    """Say what is wrong with the kind, shape or dtype of the values, or that one is not a number."""
    if len(values) != len(wanted):
        many = "value" if len(wanted) == 1 else "values"
        raise Wrong(f"{name}: return {len(wanted)} {many}, {', '.join(exercise.returns)}, not {len(values)}.")
    for what, value, expected in zip(exercise.returns, values, wanted, strict=True):
        if not isinstance(value, Tensor):
            raise Wrong(f"{name}: {what} must be a torch tensor, this is {_kind(value)}")
        if value.shape != expected.shape:
            raise Wrong(
                f"{name}: {what} must have shape {tuple(expected.shape)} where the arguments have {_shapes(trial)}; "
                f"yours has {tuple(value.shape)}."
            )
        if value.dtype != expected.dtype:
            like = "that of the arguments" if _shapes(trial) else "that of Python's numbers"
            raise Wrong(f"{name}: {what} must have dtype {expected.dtype}, {like}, not {value.dtype}.")
        bad = ~torch.isfinite(value) & torch.isfinite(expected)
        if bad.any():
            at = [int(i) for i in bad.nonzero()[0]]
            shown, right = value[tuple(at)].item(), expected[tuple(at)].item()
            raise Wrong(f"{name}: {what} is {shown} at {at}, and {right:.6g} was to be found there.")


def _kind(value: Any) -> str:
    return "None: is a return missing?" if value is None else f"of type {type(value).__name__}."


def _furthest(exercise: Exercise, values: tuple, wanted: tuple) -> str:
    for what, value, expected in zip(exercise.returns, values, wanted, strict=True):
        off = torch.nan_to_num((value - expected).abs() / (1 + expected.abs()), nan=torch.inf)
        if off.numel() and off.max() > exercise.within:
            at = [int(i) for i in torch.unravel_index(off.argmax(), off.shape)]
            yours, right = value[tuple(at)].item(), expected[tuple(at)].item()
            where = f"at {at} " if at else ""
            digits = 6 if f"{yours:.6g}" != f"{right:.6g}" else 12
            found = f"yours is {yours:.{digits}g} and {right:.{digits}g} was to be found"
            return f"{what} is furthest off {where}where {found}"
    return "the values disagree"


def _agree(values: tuple, wanted: tuple, within: float) -> bool:
    if len(values) != len(wanted):
        return False
    for value, expected in zip(values, wanted, strict=True):
        if not isinstance(value, Tensor) or value.shape != expected.shape or value.dtype != expected.dtype:
            return False
        if not torch.allclose(value, expected, rtol=within, atol=within, equal_nan=True):
            return False
    return True


def _same_as_slip(values: tuple, slip: Callable[..., Any], trial: tuple[Any, ...], within: float) -> bool:
    return _agree(values, _tuple(slip(*_copy(trial))), within)


def _copy(trial: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in trial)


def _tuple(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, tuple | list) else (values,)


def _named(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    """The answer as a function whose failures are told in a sentence; one value comes back as itself."""

    def named(*trial: Any) -> Any:
        values = _call(name, answer, trial, ("energy", "plane_grid", "log_mass"))
        return values[0] if len(values) == 1 else values

    named.name = name  # type: ignore[attr-defined]
    return named


# The oracles, and the slips: nothing below is imported from the package. Source of most slips: public code.


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _log_normal(z: Tensor) -> Tensor:
    return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)


def _constant(z: Tensor) -> float:
    return 0.5 * z.shape[-1] * math.log(2 * math.pi)


# A1. One step with free u, and a chain of them.


def _step(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return z + u * torch.tanh(z @ w + b).unsqueeze(-1)


def _ladj(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return ladj_by_autograd(lambda point: point + u * torch.tanh(point @ w + b), z)


def _h_prime(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return 1 - torch.tanh(z @ w + b) ** 2


def _det(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return 1 + w @ u * _h_prime(z, w, b)


def _chain(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = z.new_zeros(len(z))
    for k in range(len(w)):
        total = total + _ladj(z, w[k], u[k], b[k])
        z = _step(z, w[k], u[k], b[k])
    return z, total


def _unchained(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    parts = [_chain(z, w[k : k + 1], u[k : k + 1], b[k : k + 1]) for k in range(len(w))]
    return (parts[-1][0], sum(part[1] for part in parts)) if parts else _chain(z, w, u, b)  # type: ignore[return-value]


def _last_ladj(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    before = _chain(z, w[:-1], u[:-1], b[:-1])[0]
    zK, last = _chain(before, w[-1:], u[-1:], b[-1:])
    return zK, last


def _ladj_at_z0(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return _chain(z, w, u, b)[0], torch.stack([_ladj(z, *step) for step in zip(w, u, b, strict=True)]).sum(0)


def _log_qK(z0: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    zK, total = _chain(z0, w, u, b)
    return zK, _log_normal(z0) - total


def _squares(z: Tensor, w: Tensor, u: Tensor, b: Tensor, h: float) -> Tensor:
    sides = [_step(z + h * side, w, u, b) - _step(z, w, u, b) for side in torch.eye(2, dtype=z.dtype)]
    return (sides[0][:, 0] * sides[1][:, 1] - sides[0][:, 1] * sides[1][:, 0]) / h**2


def _middle(z: Tensor, w: Tensor, u: Tensor, b: Tensor, h: float) -> Tensor:
    one, other = (
        _step(z + h / 2 * side, w, u, b) - _step(z - h / 2 * side, w, u, b) for side in torch.eye(2, dtype=z.dtype)
    )
    return (one[:, 0] * other[:, 1] - one[:, 1] * other[:, 0]) / h**2


def _step_trials(draw: Draw) -> list[tuple[Any, ...]]:
    return [(draw(n, D), draw(D), draw(D), draw()) for n, D in ((7, 2), (4, 3), (1, 1), (5, 2))] + [
        (draw(6, 2), torch.tensor([1.0, 0.5]).double(), torch.tensor([-3.0, -1.0]).double(), draw())
    ]


def _chain_trials(draw: Draw) -> list[tuple[Any, ...]]:
    return [(draw(n, D), draw(K, D), draw(K, D), draw(K)) for n, K, D in ((6, 3, 2), (4, 5, 3), (3, 1, 1), (5, 4, 2))]


A1: dict[str, Exercise] = {
    "A1.step": Exercise(
        _step_trials,
        _step,
        {
            "u tanh(wᵀz + b) without the leading z: it sends the plane onto a segment": lambda z, w, u, b: (
                _step(z, w, u, b) - z
            ),
            "the step without b": lambda z, w, u, b: _step(z, w, u, 0 * b),
            "the step with u and w exchanged": lambda z, w, u, b: _step(z, u, w, b),
            "the step with a minus before u": lambda z, w, u, b: _step(z, w, -u, b),
        },
        ("z_next",),
    ),
    "A1.ladj": Exercise(
        _step_trials,
        _ladj,
        {
            "the log-determinant with the wrong sign": lambda *a: -_ladj(*a),
            "the determinant itself, without the log": lambda *a: _ladj(*a).exp(),
            "the determinant with its sign, without the log": _det,
            "the log-determinant summed over the batch": lambda *a: _ladj(*a).sum(),
            "the log-determinant summed over the batch and broadcast": lambda *a: _ladj(*a).sum().expand(len(a[0])),
            "log(1 + wᵀu h′) without the absolute value: a fold (wᵀu < −1) gives NaN": lambda *a: torch.log(_det(*a)),
            "log|1 + wᵀu h| with h = tanh(a) in the place of its derivative h′ = 1 − tanh² a": lambda z, w, u, b: (
                torch.log((1 + w @ u * torch.tanh(z @ w + b)).abs())
            ),
            "log|1 + wᵀu (1 − tanh a)|: the square of tanh a is missing": lambda z, w, u, b: torch.log(
                (1 + w @ u * (1 - torch.tanh(z @ w + b))).abs()
            ),
            "log|1 + wᵀu| without h′": lambda z, w, u, b: torch.log((1 + w @ u).abs()).expand(len(z)),
            "log|wᵀu h′|: the 1 of the identity is missing": lambda *a: torch.log((_det(*a) - 1).abs()),
            "log(|det| + 1e-8): an epsilon that is not needed and bends small determinants": lambda *a: torch.log(
                _det(*a).abs() + 1e-8
            ),
        },
        ("ladj",),
    ),
    "A1.chain": Exercise(
        _chain_trials,
        _chain,
        {
            "K steps that are not chained: each acts on z_0, all their log-determinants are added": _unchained,
            "a sum of log-determinants divided by K": lambda z, w, u, b: (
                _chain(z, w, u, b)[0],
                _chain(z, w, u, b)[1] / len(w),
            ),
            "the log-determinant of the last step only": _last_ladj,
            "the sum of log-determinants with the wrong sign": lambda *a: (_chain(*a)[0], -_chain(*a)[1]),
            "the log-determinants summed over the batch": lambda *a: (_chain(*a)[0], _chain(*a)[1].sum()),
            "the log-determinants summed over the batch and broadcast": lambda *a: (
                _chain(*a)[0],
                _chain(*a)[1].sum().expand(len(a[0])),
            ),
            "the steps in reverse order": lambda z, w, u, b: _chain(z, w.flip(0), u.flip(0), b.flip(0)),
            "every step's log-determinant at z_0: the second step starts at z_1": _ladj_at_z0,
            "each step's log-determinant at the point where the step ends, not where it starts": lambda z, w, u, b: (
                _chain(z, w, u, b)[0],
                torch.stack(
                    [_ladj(_chain(z, w[: k + 1], u[: k + 1], b[: k + 1])[0], w[k], u[k], b[k]) for k in range(len(w))]
                ).sum(0),
            ),
        },
        ("zK", "sum_ladj"),
    ),
    "A1.log_qK": Exercise(
        _chain_trials,
        _log_qK,
        {
            "log q_0 + Σ ladj: where space is stretched a density falls, so the sign is minus": lambda *a: (
                _log_qK(*a)[0],
                _log_normal(a[0]) + _chain(*a)[1],
            ),
            "log q_0 taken at z_K: it belongs at z_0, where the draw was made": lambda *a: (
                _log_qK(*a)[0],
                _log_normal(_chain(*a)[0]) - _chain(*a)[1],
            ),
            "log q_0 without its constant −(D/2) log 2π": lambda *a: (
                _log_qK(*a)[0],
                _log_qK(*a)[1] + _constant(a[0]),
            ),
            "log q_0 with the constant −log 2π, right for D = 2 only": lambda *a: (
                _log_qK(*a)[0],
                _log_qK(*a)[1] + _constant(a[0]) - math.log(2 * math.pi),
            ),
            "log q_0 with −½ log 2π once: each of the D coordinates has one": lambda *a: (
                _log_qK(*a)[0],
                _log_qK(*a)[1] + _constant(a[0]) - 0.5 * math.log(2 * math.pi),
            ),
            "log q_0 with −zᵀz: the ½ is missing": lambda *a: (
                _log_qK(*a)[0],
                _log_qK(*a)[1] - _dot(a[0], a[0]) / 2,
            ),
            "log q_0 without Σ ladj": lambda *a: (_log_qK(*a)[0], _log_normal(a[0])),
            "the density of steps that are not chained": lambda *a: (
                _unchained(*a)[0],
                _log_normal(a[0]) - _unchained(*a)[1],
            ),
        },
        ("zK", "log_qK"),
    ),
    "A1.squares": Exercise(
        lambda draw: (
            [(draw(6, 2), draw(2), draw(2), draw(), h) for h in (1e-3, 1e-2)]
            + [(0.3 * draw(6, 2), *torch.tensor([[1.0, 0.5], [-3.0, -1.0]]).double(), 0.1 * draw(), 0.1)]
        ),
        lambda *a: _squares(*a).abs(),
        {
            "the area with its sign": _squares,
            "the area itself, not divided by that of the square, h²": lambda *a: _squares(*a).abs() * a[-1] ** 2,
            "the area divided by h instead of h²": lambda *a: _squares(*a).abs() * a[-1],
            "twice the ratio": lambda *a: 2 * _squares(*a).abs(),
            "half the ratio: that of a triangle": lambda *a: _squares(*a).abs() / 2,
            "|det| by the formula: measure the square of side h instead": lambda *a: _det(*a[:4]).abs(),
            "the ratio for a square with z at its middle: its corner is to be at z": lambda *a: _middle(*a).abs(),
        },
        ("ratio",),
        within=1e-6,
    ),
}


# A2. û and the inverse; m is the paper's.


def _m(s: Tensor) -> Tensor:
    return torch.clamp(s, min=0) + torch.log1p(torch.exp(-s.abs())) - 1


def _m_naive(s: Tensor) -> Tensor:
    return -1 + torch.log(1 + torch.exp(s))


def _m_shifted(s: Tensor) -> Tensor:
    return _m(s + math.log(math.e - 1))


def _m_twice(s: Tensor) -> Tensor:
    return -1 + torch.log1p(_m(s) + 1)


def _u_hat(w: Tensor, u: Tensor, m: Callable[[Tensor], Tensor] = _m) -> Tensor:
    s = _dot(w, u)
    return u + ((m(s) - s) / _dot(w, w)).unsqueeze(-1) * w


def _slack_ladj(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    h = torch.tanh(z @ w + b)
    s = w @ u
    slack = torch.clamp(s, min=0) + torch.log1p(torch.exp(-s.abs()))
    return torch.log(h**2 + slack * (1 - h**2))


def _recomputed(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return torch.log(_det(z, w, _u_hat(w, u), b))


def _bisect(z_next: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    """f⁻¹ by bisection in a = wᵀz + b, where a + wᵀu tanh a = wᵀz′ + b."""
    s, target = w @ u, z_next @ w + b
    lo, hi = target - s.abs(), target + s.abs()
    for _ in range(200):
        middle = (lo + hi) / 2
        low = middle + s * torch.tanh(middle) < target
        lo, hi = torch.where(low, middle, lo), torch.where(low, hi, middle)
    return z_next - u * torch.tanh((lo + hi) / 2).unsqueeze(-1)


def _fixed_point(z_next: Tensor, w: Tensor, u: Tensor, b: Tensor, n: int = 100) -> Tensor:
    z = z_next
    for _ in range(n):
        z = z_next - (_step(z, w, u, b) - z)
    return z


def _log_q_anywhere(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return _log_normal(_back(z, w, u, b)) - _sum_going_back(lambda *a: torch.log(_det(*a).abs()), z, w, u, b)


def _pairs(draw: Draw) -> list[tuple[Any, ...]]:
    return [(draw(8, D) * size, draw(8, D) * 4) for D, size in ((2, 1.0), (3, 0.3), (1, 1.0), (2, 3.0))]


def _inverse_trials(draw: Draw) -> list[tuple[Any, ...]]:
    trials = []
    for slack in (0.5, 2.0, 6.0, 40.0, 0.05):
        w, u = draw(2), draw(2)
        u = u + (slack - 1 - w @ u) / (w @ w) * w
        trials.append((2 * draw(6, 2), w, u, draw()))
    return trials


def _safe_chains(draw: Draw) -> list[tuple[Any, ...]]:
    trials = []
    for n, K, D in ((6, 3, 2), (4, 2, 3), (5, 1, 1)):
        w, u = draw(K, D), draw(K, D)
        trials.append((draw(n, D), w, _u_hat(w, u), draw(K)))
    return trials


def _s_of(trial: tuple[Any, ...]) -> str:
    return f"with wᵀu = {trial[1] @ trial[2]:.1f}".replace("-", "−")


def _sum_going_back(ladj: Callable[..., Tensor], z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    total = z.new_zeros(len(z))
    for k in reversed(range(len(w))):
        z = _bisect(z, w[k], u[k], b[k])
        total = total + ladj(z, w[k], u[k], b[k])
    return total


def _lowest(trial: tuple[Any, ...], u_hat: Tensor) -> str:
    """What wᵀû came to, if the answer has the shape of u."""
    w = trial[0]
    if not isinstance(u_hat, Tensor) or u_hat.shape != w.shape:
        return ""
    low = _dot(w, u_hat).min().item()
    return f"wᵀû reached {low:.1f} in our trial, and must stay above −1".replace("-", "−") if low < -1 else ""


A2: dict[str, Exercise] = {
    "A2.m": Exercise(
        lambda draw: [(3 * draw(9),), (torch.tensor([-700.0, -40.0, 0.0, 40.0, 90.0, 800.0]).double(),)],
        _m,
        {
            "log(1 + exp(s)) or log1p(exp(s)) taken literally: exp(s) is infinite from s = 710 on": _m_naive,
            "−1 + log(1 + softplus(s)): one logarithm too many": _m_twice,
            "the shifted m, with m(0) = 0: the paper's was asked for": _m_shifted,
            "softplus(s) without the −1": lambda s: _m(s) + 1,
            "max(s, −1): not smooth, and the slack can be 0": lambda s: torch.clamp(s, min=-1),
        },
        ("m",),
    ),
    "A2.u_hat": Exercise(
        _pairs,
        _u_hat,
        {
            "û divided by ‖w‖ instead of ‖w‖²": lambda w, u: (
                u + ((_m(_dot(w, u)) - _dot(w, u)) / _dot(w, w).sqrt()).unsqueeze(-1) * w
            ),
            "û not divided by ‖w‖² at all": lambda w, u: u + (_m(_dot(w, u)) - _dot(w, u)).unsqueeze(-1) * w,
            "u itself, with no û at all": lambda w, u: u,
            "û with ‖w‖² summed over the whole batch": lambda w, u: (
                u + (_m(_dot(w, u)) - _dot(w, u)).unsqueeze(-1) * w / (w * w).sum()
            ),
            "û with m(s) in the place of m(s) − s: wᵀû is then s + m(s)": lambda w, u: (
                u + (_m(_dot(w, u)) / _dot(w, w)).unsqueeze(-1) * w
            ),
            "û with wᵀu summed over the whole batch": lambda w, u: (
                u + ((_m((w * u).sum()) - (w * u).sum()) / (w * w).sum(-1, keepdim=True)) * w
            ),
            "û only where wᵀu < −1: m(s) is not s elsewhere, so û changes every u": lambda w, u: torch.where(
                _dot(w, u).unsqueeze(-1) < -1, _u_hat(w, u), u
            ),
            "û with the correction subtracted": lambda w, u: 2 * u - _u_hat(w, u),
            "û corrected along u instead of w": lambda w, u: (
                u + ((_m(_dot(w, u)) - _dot(w, u)) / _dot(w, w)).unsqueeze(-1) * u
            ),
            "û of max(s, −1): wᵀû is exactly −1 there, and the step flattens": lambda w, u: _u_hat(
                w, u, lambda s: torch.clamp(s, min=-1)
            ),
            "û with −1 + log(1 + softplus(s)): one logarithm too many": lambda w, u: _u_hat(w, u, _m_twice),
            "û of the shifted m: the paper's was asked for": lambda w, u: _u_hat(w, u, _m_shifted),
            "û with softplus(s) for m(s): the −1 is missing": lambda w, u: _u_hat(w, u, lambda s: _m(s) + 1),
        },
        ("u_hat",),
        evidence=_lowest,
    ),
    "A2.ladj": Exercise(
        lambda draw: [
            (torch.cat([draw(5, 2), torch.zeros(1, 2).double()]), w, u, torch.tensor(b).double())
            for w, u, b in (
                (draw(2), draw(2), 0.3),
                (torch.tensor([1.0, 0.0]).double(), torch.tensor([-45.0, 1.0]).double(), 0.0),
                (draw(2), 3 * draw(2), -0.4),
            )
        ],
        _slack_ladj,
        {
            "a slack that is rounded away: at s = −45 it is 3e-20, and 1 + wᵀû, 1 + m(s), log(1 + exp(s)) lose it": (
                _recomputed
            ),
            "the determinant itself, without the log": lambda *a: _slack_ladj(*a).exp(),
            "log(|1 + wᵀû h′| + 1e-8): no determinant can be smaller than 1e-8": lambda *a: torch.log(
                _det(a[0], a[1], _u_hat(a[1], a[2]), a[3]).abs() + 1e-8
            ),
            "the determinant with u in the place of û": lambda *a: torch.log(_det(*a).abs()),
            "the log-determinant with the wrong sign": lambda *a: -_slack_ladj(*a),
        },
        ("ladj",),
        within=1e-8,
        about=_s_of,
    ),
    "A2.inverse": Exercise(
        _inverse_trials,
        _bisect,
        {
            "z′ − u tanh(wᵀz′ + b): tanh belongs at z, which is not known yet": lambda *a: 2 * a[0] - _step(*a),
            "the forward step once more": _step,
            "z′ + u tanh a: the step added u tanh a, its inverse takes it away": lambda *a: 2 * a[0] - _bisect(*a),
            "the inverse without b": lambda z, w, u, b: _bisect(z, w, u, 0 * b),
            "the inverse of the step with û: here u is used as it is given": lambda z, w, u, b: _bisect(
                z, w, _u_hat(w, u), b
            ),
            **{
                f"the fixed-point iteration z ← z′ − u tanh(wᵀz + b) ({n} times): it diverges once wᵀu > 1": (
                    lambda z, w, u, b, n=n: _fixed_point(z, w, u, b, n)
                )
                for n in (10, 20, 49, 50)
            },
        },
        ("z",),
        within=1e-6,
        about=_s_of,
    ),
    "A2.log_qK": Exercise(
        _safe_chains,
        _log_q_anywhere,
        {
            "log q_0 at z itself, minus Σ ladj of the steps forward from z: z is where the chain ends": lambda *a: (
                _log_normal(a[0]) - _chain(*a)[1]
            ),
            "log q_0 + Σ ladj: the sign is minus": lambda *a: 2 * _log_normal(_back(*a)) - _log_q_anywhere(*a),
            "log q_0 without Σ ladj": lambda *a: _log_normal(_back(*a)),
            "Σ ladj with û, as exercise 4's function has it: here u is used as it is given": lambda *a: (
                _log_normal(_back(*a)) - _sum_going_back(_slack_ladj, *a)
            ),
            "each step's log-determinant at the point where the step ends, not where it starts": lambda *a: (
                _log_normal(_back(*a)) - _sum_going_back(lambda z, *step: _ladj(_step(z, *step), *step), *a)
            ),
            "log q_0 at z itself: it belongs where the way back ends": lambda *a: (
                _log_normal(a[0]) - _sum_going_back(_ladj, *a)
            ),
            "the steps undone in the order in which they were done: the last comes off first": lambda z, w, u, b: (
                _log_q_anywhere(z, w.flip(0), u.flip(0), b.flip(0))
            ),
        },
        ("log_qK",),
        within=1e-6,
    ),
}


def _back(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    for k in reversed(range(len(w))):
        z = _bisect(z, w[k], u[k], b[k])
    return z


# A3. The ELBO, term by term.


def _log_px_z(x: Tensor, logits: Tensor) -> Tensor:
    log_p, log_1_p = (torch.nn.functional.logsigmoid(sign * logits) for sign in (1, -1))
    return _dot(x, log_p) + _dot(1 - x, log_1_p)


def _from_p(x: Tensor, p: Tensor, eps: float = 0.0) -> Tensor:
    return _dot(x, torch.log(p + eps)) + _dot(1 - x, torch.log(1 - p + eps))


def _log_q0(z0: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return torch.distributions.Normal(mu, torch.exp(logvar / 2)).log_prob(z0).sum(-1)


def _square(z0: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return (z0 - mu) ** 2 * torch.exp(-logvar)


def _elbo(x: Tensor, logits: Tensor, z0: Tensor, zK: Tensor, mu: Tensor, logvar: Tensor, sum_ladj: Tensor) -> Tensor:
    return _log_px_z(x, logits) + _log_normal(zK) - _log_q0(z0, mu, logvar) + sum_ladj


def _kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, torch.exp(logvar / 2)), torch.distributions.Normal(0 * mu, 1 + 0 * mu)
    ).sum(-1)


def _log_mean_exp(draws: Tensor) -> Tensor:
    top = draws.max(0).values
    return top + torch.log(torch.exp(draws - top).mean(0))


def _gaussians(draw: Draw) -> list[tuple[Any, ...]]:
    return [(draw(n, D), draw(n, D), draw(n, D)) for n, D in ((6, 2), (5, 3), (4, 1))]


def _elbo_trials(draw: Draw) -> list[tuple[Any, ...]]:
    return [
        (draw.uniform(n, 9), 3 * draw(n, 9), draw(n, D), draw(n, D), draw(n, D), draw(n, D), draw(n))
        for n, D in ((5, 2), (4, 3), (6, 2))
    ]


A3: dict[str, Exercise] = {
    "A3.log_px_z": Exercise(
        lambda draw: (
            [(draw.uniform(n, d), 3 * draw(n, d)) for n, d in ((5, 7), (3, 4), (6, 20))]
            + [(draw.uniform(4, 3), torch.tensor([[60.0, -60.0, 0.0]]).double().repeat(4, 1))]
        ),
        _log_px_z,
        {
            "the mean over pixels, not the sum": lambda x, logits: _log_px_z(x, logits) / x.shape[-1],
            "the sum over the whole batch": lambda x, logits: _log_px_z(x, logits).sum(),
            "the mean over the whole batch": lambda x, logits: _log_px_z(x, logits).mean(),
            "the cross-entropy: the sign is turned": lambda x, logits: -_log_px_z(x, logits),
            "log of a rounded sigmoid: at a logit of 60 it is log 0": lambda x, logits: _from_p(
                x, torch.sigmoid(logits)
            ),
            **{
                f"log(p + {eps:.0e}): the epsilon hides log 0, and cuts a logit of 60 off": (
                    lambda x, logits, eps=eps: _from_p(x, torch.sigmoid(logits), eps)
                )
                for eps in (1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12)
            },
            "binary_cross_entropy of a rounded sigmoid: it cuts every log off at −100": lambda x, logits: (
                -torch.nn.functional.binary_cross_entropy(torch.sigmoid(logits), x, reduction="none").sum(-1)
            ),
            "log-sigmoid of 1 − logit: 1 − p is the sigmoid of −logit": lambda x, logits: (
                _dot(x, torch.nn.functional.logsigmoid(logits))
                + _dot(1 - x, torch.nn.functional.logsigmoid(1 - logits))
            ),
            "only the pixels that are on, x log p: (1 − x) log(1 − p) is missing": lambda x, logits: _dot(
                x, torch.nn.functional.logsigmoid(logits)
            ),
        },
        ("log_px_z",),
    ),
    "A3.log_q0": Exercise(
        _gaussians,
        _log_q0,
        {
            "log q_0 with Σ log σ² in the place of ½ Σ log σ²": lambda z, mu, logvar: (
                _log_q0(z, mu, logvar) - logvar.sum(-1) / 2
            ),
            "log q_0 without the ½ of the square": lambda *a: _log_q0(*a) - _square(*a).sum(-1) / 2,
            "log q_0 with no ½ at all": lambda z, mu, logvar: -_constant(z) - (logvar + _square(z, mu, logvar)).sum(-1),
            "σ = exp(log σ²): exp of half of it is σ": lambda z, mu, logvar: _log_q0(z, mu, 2 * logvar),
            "log σ² used as if it were σ": lambda z, mu, logvar: (
                -_constant(z) - 0.5 * (torch.log(logvar**2) + (z - mu) ** 2 / logvar**2).sum(-1)
            ),
            "log q_0 without its constant −(D/2) log 2π": lambda *a: _log_q0(*a) + _constant(a[0]),
            "log q_0 with the constant −log 2π, right for D = 2 only": lambda *a: (
                _log_q0(*a) + _constant(a[0]) - math.log(2 * math.pi)
            ),
            "log q_0 with −½ log 2π once: each of the D coordinates has one": lambda *a: (
                _log_q0(*a) + _constant(a[0]) - 0.5 * math.log(2 * math.pi)
            ),
            "log q_0 with −log 2π for every D, and with Σ log σ² in the place of ½ Σ log σ²": lambda z, mu, logvar: (
                _log_q0(z, mu, logvar) + _constant(z) - math.log(2 * math.pi) - logvar.sum(-1) / 2
            ),
            "log q_0 with the square divided by σ, not σ²": lambda z, mu, logvar: (
                -_constant(z) - 0.5 * (logvar + (z - mu) ** 2 * torch.exp(-logvar / 2)).sum(-1)
            ),
            "the mean over the D coordinates, not the sum": lambda *a: _log_q0(*a) / a[0].shape[-1],
            "log q_0 without μ": lambda z, mu, logvar: _log_q0(z, 0 * mu, logvar),
            "the sign turned": lambda *a: -_log_q0(*a),
            "the sum over the whole batch": lambda *a: _log_q0(*a).sum(),
        },
        ("log_q0",),
    ),
    "A3.log_pz": Exercise(
        lambda draw: [(2 * draw(n, D),) for n, D in ((6, 2), (5, 3), (4, 1))],
        _log_normal,
        {
            "log p(z_K) with both signs turned": lambda z: -_log_normal(z),
            "log p(z_K) without its constant −(D/2) log 2π": lambda z: _log_normal(z) + _constant(z),
            "log p(z_K) with the constant −log 2π, right for D = 2 only": lambda z: (
                _log_normal(z) + _constant(z) - math.log(2 * math.pi)
            ),
            "log p(z_K) with −½ log 2π once: each of the D coordinates has one": lambda z: (
                _log_normal(z) + _constant(z) - 0.5 * math.log(2 * math.pi)
            ),
            "log p(z_K) with −zᵀz: the ½ is missing": lambda z: _log_normal(z) - _dot(z, z) / 2,
            "the density, without the log": lambda z: _log_normal(z).exp(),
            "the sum over the whole batch": lambda z: _log_normal(z).sum(),
        },
        ("log_pz",),
    ),
    "A3.elbo": Exercise(
        _elbo_trials,
        _elbo,
        {
            "the ELBO with the prior at z_0: an objective without an upper bound": lambda *a: (
                _elbo(*a) - _log_normal(a[3]) + _log_normal(a[2])
            ),
            "the ELBO with − Σ ladj: −log q_K = −log q_0 + Σ ladj": lambda *a: _elbo(*a) - 2 * a[-1],
            "the ELBO without Σ ladj": lambda *a: _elbo(*a) - a[-1],
            "the ELBO with Σ ladj summed over the batch": lambda *a: _elbo(*a) - a[-1] + a[-1].sum(),
            "the ELBO with + log q_0": lambda *a: _elbo(*a) + 2 * _log_q0(a[2], a[4], a[5]),
            "the ELBO with log q_0 at z_K: it belongs at z_0": lambda *a: (
                _elbo(*a) + _log_q0(a[2], a[4], a[5]) - _log_q0(a[3], a[4], a[5])
            ),
            "−ELBO, the loss": lambda *a: -_elbo(*a),
            "the mean over the batch: one number an image was asked for": lambda *a: _elbo(*a).mean(),
            "the sum over the batch": lambda *a: _elbo(*a).sum(),
            "log p(x|z_K) − KL(q_0‖p) + Σ ladj: that KL has the prior at z_0": lambda *a: (
                _log_px_z(a[0], a[1]) - _kl(a[4], a[5]) + a[6]
            ),
            "the ELBO with Σ log σ² in the place of ½ Σ log σ²": lambda *a: _elbo(*a) + a[5].sum(-1) / 2,
        },
        ("elbo",),
    ),
    "A3.kl": Exercise(
        lambda draw: [(draw(n, D), draw(n, D)) for n, D in ((6, 2), (5, 3), (4, 1))],
        _kl,
        {
            "the KL with the wrong sign": lambda *a: -_kl(*a),
            "twice the KL: the ½ is missing": lambda *a: 2 * _kl(*a),
            "the KL with σ = exp(log σ²)": lambda mu, logvar: _kl(mu, 2 * logvar),
            "the KL with σ in the place of σ²": lambda mu, logvar: (
                _kl(mu, logvar) + 0.5 * (torch.exp(logvar / 2) - torch.exp(logvar)).sum(-1)
            ),
            "the KL with log σ² in the place of σ²": lambda mu, logvar: (
                _kl(mu, logvar) + 0.5 * (logvar - torch.exp(logvar)).sum(-1)
            ),
            "KL(N(0, I)‖q_0), the other way round": lambda mu, logvar: (
                0.5 * ((1 + mu**2) * torch.exp(-logvar) - 1 + logvar).sum(-1)
            ),
            "the mean over the latent dimensions, not the sum": lambda mu, logvar: _kl(mu, logvar) / mu.shape[-1],
            "the mean over the batch: one number an image was asked for": lambda *a: _kl(*a).mean(),
            "the sum over the batch": lambda *a: _kl(*a).sum(),
        },
        ("kl",),
    ),
    "A3.log_mean_exp": Exercise(
        lambda draw: [(draw(n, B) - shift,) for n, B, shift in ((50, 3, 0.0), (20, 4, 2.0), (30, 2, 900.0))],
        _log_mean_exp,
        {
            "the mean of the draws: that is the ELBO, not the log of the mean of exp": lambda d: d.mean(0),
            "log of a mean of exp that underflows: exp(−900) is 0": lambda d: torch.log(torch.exp(d).mean(0)),
            "logsumexp without − log n": lambda d: torch.logsumexp(d, 0),
            "the mean over the images, not over the draws": lambda d: torch.logsumexp(d, 1) - math.log(d.shape[1]),
        },
        ("log_px",),
    ),
}


# A4. The amortized VAE: the steps are each image's own. û is the shifted one, as in the package.


def _split(heads: Tensor, D: int, K: int) -> tuple[Tensor, ...]:
    mu, logvar, w, u, b = heads[:, :D], heads[:, D : 2 * D], heads[:, 2 * D :][:, : K * D], None, heads[:, -K:]
    u = heads[:, 2 * D + K * D : 2 * D + 2 * K * D]
    return mu, logvar, w.reshape(-1, K, D), u.reshape(-1, K, D), b


def _split_by(order: str) -> Callable[..., tuple[Tensor, ...]]:
    """A split that hands the parts out in another order."""

    def split(heads: Tensor, D: int, K: int) -> tuple[Tensor, ...]:
        parts = dict(zip("mlwub", _split(heads, D, K), strict=True))
        return tuple(parts[letter] for letter in order)

    return split


def _split_columns(heads: Tensor, D: int, K: int) -> tuple[Tensor, ...]:
    mu, logvar, w, u, b = _split(heads, D, K)
    return mu, logvar, *(part.reshape(-1, D, K).transpose(1, 2) for part in (w, u)), b


def _split_b_first(heads: Tensor, D: int, K: int) -> tuple[Tensor, ...]:
    return _split(torch.cat([heads[:, : 2 * D], heads[:, 2 * D + K :], heads[:, 2 * D : 2 * D + K]], 1), D, K)


def _split_by_step(heads: Tensor, D: int, K: int) -> tuple[Tensor, ...]:
    steps = heads[:, 2 * D :].reshape(-1, K, 2 * D + 1)
    return heads[:, :D], heads[:, D : 2 * D], steps[..., :D], steps[..., D:-1], steps[..., -1]


def _draw_z0(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    return mu + torch.exp(logvar / 2) * eps


def _own_flow(
    z: Tensor, w: Tensor, u: Tensor, b: Tensor, m: Callable[[Tensor], Tensor] | None = _m_shifted
) -> tuple[Tensor, Tensor]:
    """The flow of each image, one at a time: z (B, D), w and u (B, K, D), b (B, K)."""
    u_hat = u if m is None else _u_hat(w, u, m)
    if len(z) == 0:
        return z, z.sum(-1)
    parts = [_chain(z[i : i + 1], w[i], u_hat[i], b[i]) for i in range(len(z))]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _own_unchained(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    u_hat = _u_hat(w, u, _m_shifted)
    parts = [_unchained(z[i : i + 1], w[i], u_hat[i], b[i]) for i in range(len(z))]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _own_sum_of_u(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros_like(z[:, 0])
    for k in range(w.shape[1]):
        h_prime = 1 - torch.tanh(_dot(w[:, k], z) + b[:, k]) ** 2
        total = total + torch.log((1 + _dot(w[:, k], u[:, k]) * h_prime).abs())
        z = _own_flow(z, w[:, k : k + 1], u[:, k : k + 1], b[:, k : k + 1])[0]
    return total


def _decoder(z: Tensor) -> Tensor:
    """Stands for a decoder: logits of six pixels, linear in z."""
    rows = torch.arange(z.shape[-1] * 6, dtype=z.dtype).reshape(z.shape[-1], 6)
    return z @ torch.cos(rows) + 0.3


def _pixels_are_z(z: Tensor) -> Tensor:
    """Stands for a decoder whose logits are z itself, so that z can be read off the picture."""
    return z


def _own_elbo(*trial: Any, prior_at: str = "zK", decode_at: str = "zK") -> Tensor:
    x, decode, mu, logvar, w, u, b, eps = trial
    z0 = _draw_z0(mu, logvar, eps)
    zK, total = _own_flow(z0, w, u, b)
    at = {"z0": z0, "zK": zK}
    return _log_px_z(x, decode(at[decode_at])) + _log_normal(at[prior_at]) - _log_q0(z0, mu, logvar) + total


def _own_log_px_z(*trial: Any) -> Tensor:
    x, decode, mu, logvar, w, u, b, eps = trial
    return _log_px_z(x, decode(_own_flow(_draw_z0(mu, logvar, eps), w, u, b)[0]))


def _image_trials(draw: Draw) -> list[tuple[Any, ...]]:
    return [
        (draw.uniform(B, 6), _decoder, draw(B, D), draw(B, D), draw(B, K, D), draw(B, K, D), draw(B, K), draw(B, D))
        for B, K, D in ((4, 3, 2), (3, 2, 3))
    ]


def _check_generate(answer: Callable[..., Any], draw: Draw) -> str:
    """Whether pictures come from z ~ N(0, I), by the mean and the covariance of 20 000 of them."""
    name, n = answer.name, 20_000  # type: ignore[attr-defined]
    p = answer(_pixels_are_z, n, 2)
    if not isinstance(p, Tensor):
        raise Wrong(f"{name}: the pictures must be a torch tensor, this is {_kind(p)}")
    if p.shape != (n, 2):
        raise Wrong(f"{name}: n = {n} pictures of 2 pixels must have shape ({n}, 2); yours has {tuple(p.shape)}.")
    p = p.double()
    if not torch.isfinite(p).all() or p.min() < 0 or p.max() > 1:
        raise Wrong(
            f"{name}: these are logits, not probabilities: {p.min():.2f} to {p.max():.2f}. A sigmoid is missing."
        )
    if ((p == 0) | (p == 1)).all():
        raise Wrong(f"{name}: these are pixels of 0 and 1; the probabilities were asked for.")
    z = torch.logit(p.clamp(1e-7, 1 - 1e-7))
    mean, cov = z.mean(0), torch.cov(z.T)
    if cov.diag().max() < 1e-6:
        raise Wrong(f"{name}: all pictures are the same: z must be drawn anew for each.")
    off = max(mean.abs().max().item(), (cov - torch.eye(2).double()).abs().max().item())
    if off > 0.08 or ((z**4).mean(0) - 3).abs().max() > 0.6:
        raise Wrong(
            f"{name}: z is not drawn from N(0, I): its mean is ({mean[0]:.2f}, {mean[1]:.2f}), its variances "
            f"{cov[0, 0]:.2f} and {cov[1, 1]:.2f}, its covariance {cov[0, 1]:.2f}. The flow belongs to q: a prior "
            "sample goes straight to the decoder."
        )
    again = answer(_pixels_are_z, n, 2)
    if torch.equal(again.double(), p):
        raise Wrong(f"{name}: a second call gives the same pictures: do not seed inside.")
    return f"mean and covariance of {n} draws are those of N(0, I)."


A4: dict[str, Exercise | Callable[..., str]] = {
    "A4.split": Exercise(
        lambda draw: [(draw(B, 2 * D + 2 * K * D + K), D, K) for B, D, K in ((4, 2, 3), (3, 3, 2), (1, 2, 1))],
        _split,
        {
            "w and u exchanged": _split_by("mluwb"),
            "μ and log σ² exchanged": _split_by("lmwub"),
            "b read before w and u: it comes last": _split_b_first,
            "w, u and b read step by step: all w come first, then all u, then all b": _split_by_step,
            "w and u filled column by column: a step's D numbers lie side by side": _split_columns,
        },
        ("mu", "logvar", "w", "u", "b"),
    ),
    "A4.draw": Exercise(
        lambda draw: [(draw(B, D), draw(B, D), draw(B, D)) for B, D in ((5, 2), (4, 3))],
        _draw_z0,
        {
            "σ = exp(log σ²): exp of half of it is σ": lambda mu, logvar, eps: mu + torch.exp(logvar) * eps,
            "log σ² used as if it were σ": lambda mu, logvar, eps: mu + logvar * eps,
            "exp(½ log σ²) without a draw: ε is missing": lambda mu, logvar, eps: mu + torch.exp(logvar / 2),
            "μ itself: z_0 must be drawn, in evaluation too": lambda mu, logvar, eps: mu,
        },
        ("z0",),
    ),
    "A4.flow": Exercise(
        lambda draw: [(draw(B, D), draw(B, K, D), 2 * draw(B, K, D), draw(B, K)) for B, K, D in ((4, 3, 2), (3, 2, 3))],
        _own_flow,
        {
            "the flow with u in the place of û": lambda z, w, u, b: _own_flow(z, w, u, b, None),
            "the flow with Σ ladj of u, though the points move by û": lambda z, w, u, b: (
                _own_flow(z, w, u, b)[0],
                _own_sum_of_u(z, w, u, b),
            ),
            "the flow with the paper's û: the shifted one was asked for": lambda z, w, u, b: _own_flow(z, w, u, b, _m),
            "K steps that are not chained: each acts on z_0, all their log-determinants are added": _own_unchained,
            "the first image's flow for all images": lambda z, w, u, b: _own_flow(
                z, *(part[:1].expand_as(part) for part in (w, u, b))
            ),
            "a sum of log-determinants divided by K": lambda z, w, u, b: (
                _own_flow(z, w, u, b)[0],
                _own_flow(z, w, u, b)[1] / w.shape[1],
            ),
            "the sum of log-determinants with the wrong sign": lambda *a: (_own_flow(*a)[0], -_own_flow(*a)[1]),
            "the log-determinants summed over the batch": lambda *a: (_own_flow(*a)[0], _own_flow(*a)[1].sum()),
            "the steps in reverse order": lambda z, w, u, b: _own_flow(z, w.flip(1), u.flip(1), b.flip(1)),
        },
        ("zK", "sum_ladj"),
        package=("constrain_u",),
    ),
    "A4.elbo": Exercise(
        _image_trials,
        _own_elbo,
        {
            "the ELBO with the prior at z_0: an objective without an upper bound": lambda *a: _own_elbo(
                *a, prior_at="z0"
            ),
            "the ELBO with z_0 decoded: the decoder is given z_K": lambda *a: _own_elbo(*a, decode_at="z0"),
            "the ELBO at z_0 = μ: z_0 must be drawn, in evaluation too": lambda *a: _own_elbo(*a[:-1], 0 * a[-1]),
            "−ELBO, the loss": lambda *a: -_own_elbo(*a),
            "the mean over the batch: one number an image was asked for": lambda *a: _own_elbo(*a).mean(),
            "the ELBO with − Σ ladj": lambda *a: _own_elbo(*a) - 2 * _own_flow(_draw_z0(a[2], a[3], a[7]), *a[4:7])[1],
            "the ELBO with the mean over pixels, not the sum": lambda *a: (
                _own_elbo(*a) - (1 - 1 / a[0].shape[-1]) * _own_log_px_z(*a)
            ),
            "log p(x|z_K) − KL(q_0‖p) + Σ ladj: that KL has the prior at z_0": lambda *a: (
                _own_log_px_z(*a) - _kl(a[2], a[3]) + _own_flow(_draw_z0(a[2], a[3], a[7]), *a[4:7])[1]
            ),
            "the ELBO without Σ ladj": lambda *a: _own_elbo(*a) - _own_flow(_draw_z0(a[2], a[3], a[7]), *a[4:7])[1],
        },
        ("elbo",),
        package=("constrain_u",),
    ),
    "A4.generate": _check_generate,
    "A4.log_px": Exercise(
        lambda draw: [(3 * draw(n, B) - shift, area) for n, B, shift, area in ((30, 3, 0, 0.1), (20, 4, 800, 0.02))],
        lambda log_joint, area: torch.logsumexp(log_joint, 0) + math.log(area),
        {
            "the sum over the grid without the area of a cell": lambda log_joint, area: torch.logsumexp(log_joint, 0),
            "the mean over the grid, not the sum times the area": lambda log_joint, area: (
                torch.logsumexp(log_joint, 0) - math.log(len(log_joint))
            ),
            "the mean over the grid times the area, not the sum": lambda log_joint, area: (
                torch.logsumexp(log_joint, 0) - math.log(len(log_joint)) + math.log(area)
            ),
            "the log of the sum times the area: take the log of the area, too": lambda log_joint, area: (
                torch.logsumexp(log_joint, 0) * area
            ),
            "log of a sum of exp that underflows: exp(−800) is 0": lambda log_joint, area: torch.log(
                (torch.exp(log_joint) * area).sum(0)
            ),
            "the area added, where its log is": lambda log_joint, area: torch.logsumexp(log_joint, 0) + area,
            "the sum over images, not over the grid": lambda log_joint, area: (
                torch.logsumexp(log_joint, 1) + math.log(area)
            ),
        },
        ("log_px",),
    ),
}


# A5. Find the bug: the mended parts, and measurements that tell a wrong one from a right one.


def _u_hat_norm(w: Tensor, u: Tensor) -> Tensor:
    """A specimen: û divided by ‖w‖."""
    return A2["A2.u_hat"].slips["û divided by ‖w‖ instead of ‖w‖²"](w, u)


def _u_hat_none(w: Tensor, u: Tensor) -> Tensor:
    """A specimen: no û."""
    return u


def _density_right(z: Tensor) -> Tensor:
    """A Gaussian's log density."""
    return _log_q0(z, *_gaussian_at(z))


def _density_no_half(z: Tensor) -> Tensor:
    """A specimen: Σ log σ² for ½ Σ log σ²."""
    mu, logvar = _gaussian_at(z)
    return _log_q0(z, mu, logvar) - logvar.sum(-1) / 2


def _density_no_constant(z: Tensor) -> Tensor:
    """A specimen: no −(D/2) log 2π."""
    return _density_right(z) + _constant(z)


def _gaussian_at(z: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tensor([0.5, -0.4], dtype=z.dtype), torch.log(torch.tensor([1.2, 0.3], dtype=z.dtype) ** 2)


def _elbo_of_parts(x: Tensor, logits: Tensor, z0: Tensor, zK: Tensor, log_q0: Tensor, sum_ladj: Tensor) -> Tensor:
    """The ELBO from the values of log q_0(z_0) and Σ ladj."""
    return _log_px_z(x, logits) + _log_normal(zK) - log_q0 + sum_ladj


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Wrong(f"{name}: return one number, this is {_kind(value)}")
    if math.isnan(value):
        raise Wrong(f"{name}: return one number, this is NaN.")
    return float(value)


def _check_lowest(answer: Callable[..., Any], draw: Draw) -> str:
    """Whether a measurement of the smallest wᵀû convicts wrong ones and acquits the right one."""
    name = answer.name  # type: ignore[attr-defined]
    right = _number(name, answer(_u_hat))
    if not -1 - 1e-6 <= right < -0.9:
        where = "below −1, where no right û can be" if right < -1 else "far from −1: try larger u, and more of them"
        raise Wrong(f"{name}: for the right û you found {right:.3f}, {where}.")
    found = {}
    for what, specimen in (("û by ‖w‖", _u_hat_norm), ("no û", _u_hat_none)):
        found[what] = _number(name, answer(specimen))
        if not found[what] < -1.01:
            raise Wrong(
                f"{name}: {what} is not convicted: you found {found[what]:.3f}, which is not below −1. Try ‖w‖ < 1."
            )
    return f"{right:.3f} for the right û, {found['û by ‖w‖']:.1f} for ‖w‖, {found['no û']:.1f} for no û."


def _check_mass(answer: Callable[..., Any], draw: Draw) -> str:
    """Whether a measurement of the mass convicts wrong densities and acquits the right one."""
    name = answer.name  # type: ignore[attr-defined]
    right = _number(name, answer(_density_right))
    if not abs(right - 1) < 0.01:
        raise Wrong(f"{name}: for a right density you found the mass {right:.3f}, and it is 1.")
    for what, specimen, mass in (
        ("the missing ½", _density_no_half, 1 / 0.36),
        ("the missing constant", _density_no_constant, 2 * math.pi),
    ):
        found = _number(name, answer(specimen))
        if not abs(found / mass - 1) < 0.02:
            raise Wrong(f"{name}: with {what} you found the mass {found:.3f}, and it is {mass:.3f}.")
    return "1.00 for the right density, 2.78 and 6.28 for the two wrong ones."


A5: dict[str, Exercise | Callable[..., str]] = {
    "A5.u_hat": A2["A2.u_hat"],
    "A5.log_q0": A3["A3.log_q0"],
    "A5.chain": A1["A1.chain"],
    "A5.elbo": Exercise(
        lambda draw: [
            (x, logits, z0, zK, _log_q0(z0, mu, logvar), sum_ladj)
            for x, logits, z0, zK, mu, logvar, sum_ladj in _elbo_trials(draw)
        ],
        _elbo_of_parts,
        {
            "the ELBO with the prior at z_0: an objective without an upper bound": lambda *a: (
                _elbo_of_parts(*a) - _log_normal(a[3]) + _log_normal(a[2])
            ),
            "the ELBO with − Σ ladj: −log q_K = −log q_0 + Σ ladj": lambda *a: _elbo_of_parts(*a) - 2 * a[-1],
            "the ELBO without Σ ladj": lambda *a: _elbo_of_parts(*a) - a[-1],
            "the ELBO with + log q_0": lambda *a: _elbo_of_parts(*a) + 2 * a[4],
            "the ELBO without log q_0": lambda *a: _elbo_of_parts(*a) + a[4],
            "−ELBO, the loss": lambda *a: -_elbo_of_parts(*a),
            "the mean over the batch: one number an image was asked for": lambda *a: _elbo_of_parts(*a).mean(),
        },
        ("elbo",),
    ),
    "A5.lowest": _check_lowest,
    "A5.mass": _check_mass,
    "A5.share_above": Exercise(
        lambda draw: [(3 * draw(40, B) + 1, draw(B)) for B in (5, 3)],
        lambda claims, log_px: (claims > log_px + 3).double().mean(),
        {
            "the share above log p(x) itself: a draw may exceed it, by 3 nats only rarely": lambda claims, log_px: (
                (claims > log_px).double().mean()
            ),
            "the share above log p(x) − 3": lambda claims, log_px: (claims > log_px - 3).double().mean(),
            "the share further than 3 nats from log p(x), on either side": lambda claims, log_px: (
                ((claims - log_px).abs() > 3).double().mean()
            ),
            "the share that lies below": lambda claims, log_px: (claims <= log_px + 3).double().mean(),
            "the number of draws, not their share": lambda claims, log_px: (claims > log_px + 3).double().sum(),
            "a percentage: a share lies between 0 and 1": lambda claims, log_px: (
                100 * (claims > log_px + 3).double().mean()
            ),
            "the share of images whose mean claim is above": lambda claims, log_px: (
                (claims.mean(0) > log_px + 3).double().mean()
            ),
        },
        ("share",),
    ),
}


# A6. Is it the flow? Numbers of a sweep, and the control.


def _of(runs: Any, arm: str, quantity: str) -> Tensor:
    return torch.tensor([run[quantity] for run in runs if run["arm"] == arm], dtype=torch.float64)


def _over_seeds(runs: Any, arm: str, quantity: str) -> tuple[Tensor, Tensor]:
    values = _of(runs, arm, quantity)
    return values.mean(), values.std()


def _difference(runs: Any, arm: str, other: str, quantity: str) -> tuple[Tensor, Tensor]:
    a, b = _of(runs, arm, quantity), _of(runs, other, quantity)
    return a.mean() - b.mean(), torch.sqrt(a.var() / len(a) + b.var() / len(b))


def _pooled(a: Tensor, b: Tensor) -> Tensor:
    squares = ((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()
    return torch.sqrt(squares / (len(a) + len(b) - 2) * (1 / len(a) + 1 / len(b)))


def _paired(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    n = min(len(a), len(b))
    return (a[:n] - b[:n]).mean(), (a[:n] - b[:n]).std() / n**0.5


def _seeds_trials(draw: Draw) -> list[tuple[float, float]]:
    """A difference and a deviation; 8 (deviation/difference)² is halfway between whole numbers, safe from rounding."""
    trials = []
    for few, sign in ((1, -1), (3, 1), (12, 1), (300, -1)):
        n, difference = few + int(few * draw.uniform().item()), 0.2 + 3 * draw.uniform().item()
        trials.append((sign * difference, difference * math.sqrt((n - 0.5) / 8)))
    return trials


def _whole(n: float) -> Tensor:
    return torch.tensor(float(math.ceil(n)), dtype=torch.float64)


def _made_runs(draw: Draw) -> list[dict[str, Any]]:
    """Runs of a made-up sweep: two arms with three seeds, one with four, in no order."""
    runs = [
        {"arm": arm, "seed": seed, "ELBO": -140 + draw().item(), "log p(x)": -137 + draw().item(), "gap": draw().item()}
        for seed in range(4)
        for arm in ("plain", "planar 3", "translation")
        if seed < 3 or arm == "plain"
    ]
    return runs


A6: dict[str, Exercise | Callable[..., str]] = {
    "A6.over_seeds": Exercise(
        lambda draw: [(_made_runs(draw), "plain", "ELBO"), (_made_runs(draw), "planar 3", "gap")],
        _over_seeds,
        {
            "the deviation divided by n, not by n − 1": lambda *a: (
                _over_seeds(*a)[0],
                _of(*a).std(correction=0),
            ),
            "the standard error of the mean; the deviation between seeds was asked for": lambda *a: (
                _over_seeds(*a)[0],
                _of(*a).std() / len(_of(*a)) ** 0.5,
            ),
            "the variance, not the deviation": lambda *a: (_over_seeds(*a)[0], _of(*a).var()),
            "mean and deviation over all arms": lambda runs, arm, quantity: (
                torch.tensor([run[quantity] for run in runs], dtype=torch.float64).mean(),
                torch.tensor([run[quantity] for run in runs], dtype=torch.float64).std(),
            ),
        },
        ("mean", "deviation"),
    ),
    "A6.difference": Exercise(
        lambda draw: [
            (_made_runs(draw), "planar 3", "plain", "ELBO"),
            (_made_runs(draw), "planar 3", "translation", "gap"),
        ],
        _difference,
        {
            "the difference with its sign turned": lambda *a: (-_difference(*a)[0], _difference(*a)[1]),
            "the sum of the two standard errors: independent errors add up in squares": lambda runs, a, b, q: (
                _difference(runs, a, b, q)[0],
                _of(runs, a, q).std() / len(_of(runs, a, q)) ** 0.5
                + _of(runs, b, q).std() / len(_of(runs, b, q)) ** 0.5,
            ),
            "the deviation between seeds, not the error of their mean: √n is missing": lambda runs, a, b, q: (
                _difference(runs, a, b, q)[0],
                torch.sqrt(_of(runs, a, q).var() + _of(runs, b, q).var()),
            ),
            "the sum of the two deviations: independent errors add up in squares, and √n is missing": (
                lambda runs, a, b, q: (_difference(runs, a, b, q)[0], _of(runs, a, q).std() + _of(runs, b, q).std())
            ),
            "one deviation pooled from both arms: each arm is to have its own": lambda runs, a, b, q: (
                _difference(runs, a, b, q)[0],
                _pooled(_of(runs, a, q), _of(runs, b, q)),
            ),
            "the mean of differences seed by seed: seeds of two arms are no pairs": lambda runs, a, b, q: _paired(
                *(_of(runs, name, q) for name in (a, b))
            ),
            "the error of the first arm alone": lambda runs, a, b, q: (
                _difference(runs, a, b, q)[0],
                _of(runs, a, q).std() / len(_of(runs, a, q)) ** 0.5,
            ),
        },
        ("difference", "error"),
    ),
    "A6.control": Exercise(
        lambda draw: [(draw(B, D), draw(B, K, D), draw(B, K)) for B, K, D in ((4, 3, 2), (3, 2, 3))],
        lambda z0, u, b: z0 + (u * torch.tanh(b).unsqueeze(-1)).sum(1),
        {
            "z_0 + Σ u, without tanh b": lambda z0, u, b: z0 + u.sum(1),
            "z_0 + Σ u b: the tanh is missing": lambda z0, u, b: z0 + (u * b.unsqueeze(-1)).sum(1),
            "the shift without z_0": lambda z0, u, b: (u * torch.tanh(b).unsqueeze(-1)).sum(1),
            "the mean over the K steps, not their sum": lambda z0, u, b: z0 + (u * torch.tanh(b).unsqueeze(-1)).mean(1),
            "one step only": lambda z0, u, b: z0 + u[:, 0] * torch.tanh(b[:, 0]).unsqueeze(-1),
            "the last step only: each step starts where the one before has ended": lambda z0, u, b: (
                z0 + u[:, -1] * torch.tanh(b[:, -1]).unsqueeze(-1)
            ),
            "one tanh of the sums: each step has its own tanh b": lambda z0, u, b: (
                z0 + u.sum(1) * torch.tanh(b.sum(1)).unsqueeze(-1)
            ),
            "the first image's shift for all images": lambda z0, u, b: z0 + torch.tanh(b[0]) @ u[0],
        },
        ("zK",),
    ),
    "A6.seeds_needed": Exercise(
        _seeds_trials,
        lambda difference, deviation: _whole(8 * (deviation / difference) ** 2),
        {
            "the seeds for one standard error: two were asked for": lambda difference, deviation: _whole(
                2 * (deviation / difference) ** 2
            ),
            "the error of one arm: both have one, so its square is 2 deviation²/n": lambda difference, deviation: (
                _whole(4 * (deviation / difference) ** 2)
            ),
            "a number that is not rounded up": lambda difference, deviation: torch.tensor(
                8 * (deviation / difference) ** 2, dtype=torch.float64
            ),
            "a number that is rounded down: it leaves the difference below two errors": lambda difference, deviation: (
                _whole(8 * (deviation / difference) ** 2 - 1)
            ),
            "a count without the square: the error falls like 1/√n": lambda difference, deviation: _whole(
                8 * deviation / abs(difference)
            ),
            "at least 2: the deviation is given, so n may be 1": lambda difference, deviation: _whole(
                max(2.0, 8 * (deviation / difference) ** 2)
            ),
        },
        ("n",),
    ),
}

EXERCISES: dict[str, Exercise | Callable[..., str]] = {**A1, **A2, **A3, **A4, **A5, **A6}
