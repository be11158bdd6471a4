"""The planar flow in one's hand: a plane, and K steps with handles to drag, in Jupyter and on a page without a kernel.

The mathematics and the drawing are in `playground.js`, one ES module; a test compares its numbers with the package's.
"""

import json
from pathlib import Path
from typing import Any

import anywidget
import torch
from torch import Tensor
from traitlets import Enum, Float, Instance

from planar_helpers import planar

MODULE = Path(__file__).with_name("playground.js")
SHEET, PAGE = MODULE.with_suffix(".css"), MODULE.with_suffix(".html")
KEYS = ("w", "u", "b", "constraint", "base", "target", "t")


def _tensor(*shape: int) -> Instance:
    """Return a trait that is a float64 tensor in Python and a list in the browser."""
    from_list = lambda value, _: torch.tensor(value, dtype=torch.float64).reshape(shape)  # noqa: E731
    return Instance(Tensor, allow_none=True).tag(sync=True, to_json=lambda value, _: value.tolist(), from_json=from_list)


class Playground(anywidget.AnyWidget):
    """Show a planar flow of the plane whose w, u and b are dragged by hand, and read here at any time.

    Shapes: w, u (K, 2), b (K,), float64. `constraint` is "shifted", "paper", or "none", which lets a step fold;
    `base` names where it starts, `target` (0 for none) what is outlined and fitted, `t` how many steps are shown, a
    part of the last one too (None: all). Each can be set, and is what the reader made of it; `set` changes w, u and b
    together. Raises ValueError for other shapes or names, TypeError for other dtypes.

    >>> playground = Playground(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.4, 0.0]]), torch.zeros(1))
    >>> playground.w.shape
    torch.Size([1, 2])
    """

    _esm = MODULE
    _css = SHEET
    w, u, b = _tensor(-1, 2), _tensor(-1, 2), _tensor(-1)
    constraint = Enum([*planar.CONSTRAINTS, "none"], "shifted").tag(sync=True)
    base = Enum(["gaussian", "square", *(f"target {i}" for i in range(1, 5))], "gaussian").tag(sync=True)
    target = Enum(range(5), 0).tag(sync=True)
    t = Float(None, allow_none=True).tag(sync=True)

    def __init__(self, w: Tensor, u: Tensor, b: Tensor, **others: Any) -> None:
        super().__init__(**dict(zip("wub", _checked(w, u, b), strict=True)), **others)

    def set(self, w: Tensor, u: Tensor, b: Tensor) -> None:
        """Give the flow other parameters, of another K too."""
        with self.hold_sync():
            self.w, self.u, self.b = _checked(w, u, b)

    def html(self) -> str:
        """Return the playground as it stands for a page without a kernel: it needs nothing beside it."""
        state = {key: getattr(self, key) for key in KEYS}
        state |= {key: state[key].tolist() for key in "wub"}
        text = PAGE.read_text(encoding="utf-8")
        for name, content in {
            "sheet": SHEET.read_text(encoding="utf-8"),
            "module": MODULE.read_text(encoding="utf-8"),
            "state": json.dumps(state),
        }.items():
            text = text.replace("{" + name + "}", content, 1)
        return text

    def __repr__(self) -> str:
        return f"Playground(K={len(self.b)}, constraint={self.constraint!r}, base={self.base!r})"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict]:
        data, metadata = super()._repr_mimebundle_(**kwargs)
        return data | {"text/html": self.html()}, metadata


def _checked(*parameters: Tensor) -> list[Tensor]:
    planar._check_parameters(*parameters)
    if parameters[0].dim() != 2 or parameters[0].shape[1] != 2:
        raise ValueError(f"w and u must have shape (K, 2), as the playground is a plane, got {tuple(parameters[0].shape)}")
    return [parameter.detach().double().cpu() for parameter in parameters]
