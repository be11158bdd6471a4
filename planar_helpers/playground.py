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

MODULE, SHEET, PAGE = (Path(__file__).with_name(f"playground.{kind}") for kind in ("js", "css", "html"))
KEYS = ("w", "u", "b", "constraint", "base", "target", "t")


def _tensor(*shape: int) -> Instance:
    """Return a trait that is a float64 tensor in Python and a list in the browser."""
    to_json, from_json = lambda value, _: value.tolist(), lambda value, _: torch.tensor(value).double().reshape(shape)
    return Instance(Tensor).tag(sync=True, to_json=to_json, from_json=from_json)


class Playground(anywidget.AnyWidget):
    """Show a planar flow of the plane whose w, u and b are dragged by hand, and read here at any time.

    Shapes: w and u (K, 2), b (K,), float64. `constraint` is "shifted", "paper", or "none", which lets a step fold;
    `base` ("gaussian", "square", "target 1" to "target 4") is where the flow starts, `target` (1 to 4, or 0) what is
    outlined and fitted, `t` how many steps are shown, a part of the last one too (None: all). Each is an attribute,
    and holds what the reader made of it; `set` changes w, u and b together. Raises ValueError for other shapes,
    TypeError for other dtypes, traitlets' TraitError for other names.

    >>> playground = Playground(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.5, 0.0]]), torch.zeros(1))
    >>> playground.u  # as given, or as it was dragged since
    tensor([[1.5000, 0.0000]], dtype=torch.float64)
    """

    _esm, _css = MODULE, SHEET
    w, u, b = _tensor(-1, 2), _tensor(-1, 2), _tensor(-1)
    constraint = Enum([*planar.CONSTRAINTS, "none"], "shifted").tag(sync=True)
    base = Enum(["gaussian", "square", *(f"target {i}" for i in range(1, 5))], "gaussian").tag(sync=True)
    target = Enum(range(5), 0).tag(sync=True)
    t = Float(None, allow_none=True).tag(sync=True)

    def __init__(self, w: Tensor, u: Tensor, b: Tensor, **others: Any) -> None:
        super().__init__(**_checked(w=w, u=u, b=b), **others)

    def set(self, w: Tensor, u: Tensor, b: Tensor) -> None:
        """Give the flow other parameters, of another K too."""
        with self.hold_sync():
            for name, value in _checked(w=w, u=u, b=b).items():
                self.set_trait(name, value)

    def html(self) -> str:
        """Return the playground as it stands now for a page without a kernel: it needs nothing beside it."""
        state = {key: getattr(self, key) for key in KEYS}
        state |= {key: state[key].tolist() for key in "wub"}
        sheet, module, page = (path.read_text(encoding="utf-8") for path in (SHEET, MODULE, PAGE))
        return page.replace("{sheet}", sheet).replace("{state}", json.dumps(state)).replace("{module}", module)

    def __repr__(self) -> str:
        return f"Playground(K={len(self.b)}, constraint={self.constraint!r}, base={self.base!r})"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict]:
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return data | {"text/html": self.html()}, metadata


def _checked(**parameters: Tensor) -> dict[str, Tensor]:
    """Return w, u and b as the playground keeps them, float64 and without history, if they are K steps of the plane."""
    planar._check_parameters(**parameters)
    shape = tuple(parameters["w"].shape)
    if len(shape) != 2 or shape[1] != 2:
        raise ValueError(f"w and u must have shape (K, 2), since the playground is a plane, got {shape}")
    return {name: value.detach().double().cpu() for name, value in parameters.items()}
