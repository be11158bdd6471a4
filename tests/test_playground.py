"""The playground without a browser: what Python reads and writes. Its numbers: tests/browser_playground.py."""

import json
import re
from pathlib import Path

import pytest
import torch
from traitlets import TraitError

from planar_helpers import planar
from planar_helpers.playground import KEYS, MODULE, PAGE, SHEET, Playground

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def some_flow(K: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(K, *rest, generator=generator) for rest in ((2,), (2,), ())]


def received(playground: Playground, **state: object) -> None:
    """What arrives when the browser has changed something."""
    playground.set_state(state)


def test_python_reads_what_the_browser_wrote_as_tensors() -> None:
    playground = Playground(*some_flow())
    received(playground, w=[[1.0, 2.0]], u=[[0.0, -1.0]], b=[0.5], t=0.25, constraint="none", base="square", target=4)
    assert playground.w.tolist() == [[1.0, 2.0]] and playground.b.dtype == torch.float64
    zK, _ = planar.planar_chain(torch.zeros(2).double(), playground.w, playground.u, playground.b)
    assert zK.shape == (2,)
    assert (playground.t, playground.constraint, playground.base, playground.target) == (0.25, "none", "square", 4)
    received(playground, w=[], u=[], b=[], t=None)  # the last step was removed
    assert planar.planar_chain(torch.ones(2).double(), playground.w, playground.u, playground.b)[1] == 0


def test_what_python_writes_is_sent_as_lists() -> None:
    playground = Playground(*some_flow())
    w, u, b = some_flow(5)
    playground.set(w.requires_grad_(), u, b)
    sent = playground.get_state(list(KEYS))
    assert json.loads(json.dumps(sent))["w"] == w.double().tolist() and len(sent["b"]) == 5
    assert not playground.w.requires_grad


def test_bad_parameters_get_a_clear_line() -> None:
    w, u, b = some_flow()
    with pytest.raises(ValueError, match=r"must have shapes \(\.\.\., K, D\)"):
        Playground(w, u, b[:2])
    with pytest.raises(
        ValueError, match=r"w and u must have shape \(K, 2\), since the playground is a plane, got \(3, 4\)"
    ):
        Playground(torch.ones(3, 4), torch.ones(3, 4), b)
    with pytest.raises(TypeError, match="float32 or float64"):
        Playground(w, u, [0.0, 0.0, 0.0])
    for name, bad in (("constraint", "off"), ("base", "ring"), ("target", 5)):
        with pytest.raises(TraitError, match=name):
            Playground(w, u, b, **{name: bad})


def test_the_page_form_stands_alone() -> None:
    text = Playground(*some_flow(), constraint="paper").html()
    assert text.count("<script") == text.count("</script>") == 1
    assert "</" not in MODULE.read_text(encoding="utf-8")  # would end the script
    assert not re.search(r"https?://|\bimport\b|\bsrc=", text)
    state = json.loads(re.search(r"^const state = (.*);$", text, re.M)[1])
    assert set(state) == set(KEYS) and state["constraint"] == "paper" and len(state["w"]) == 3
    assert "{" + "state}" not in text and "{" + "module}" not in text and "{" + "sheet}" not in text
    assert PAGE.read_text(encoding="utf-8").count("{module}") == 1


def test_both_forms_are_in_the_output_and_the_same_each_time() -> None:
    first, again = (Playground(*some_flow())._repr_mimebundle_()[0] for _ in range(2))
    assert "application/vnd.jupyter.widget-view+json" in first
    assert first["text/html"] == again["text/html"] and first["text/plain"] == again["text/plain"]


def test_the_module_is_read_in_one_sitting() -> None:
    lines = [line.strip() for line in MODULE.read_text(encoding="utf-8").splitlines()]
    assert max(map(len, MODULE.read_text(encoding="utf-8").splitlines())) <= 120
    assert len([line for line in lines if line and not line.startswith("//")]) < 600


def test_stored_playgrounds_are_todays() -> None:
    module, sheet = (path.read_text(encoding="utf-8") for path in (MODULE, SHEET))
    found = 0
    for path in sorted(NOTEBOOKS.rglob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if "Playground(" in "".join(cell["source"]) and cell["cell_type"] == "code":
                pages = ["".join(output.get("data", {}).get("text/html", "")) for output in cell["outputs"]]
                assert any(module in page and sheet in page for page in pages), f"{path.stem} stores an old playground"
                found += 1
    assert found
