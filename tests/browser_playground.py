"""Use the playground in headless Chromium, and compare its numbers with the package's.

    python tests/browser_playground.py          all of it (`make browser`)
    python tests/browser_playground.py fit      the checks whose name holds this word
    python tests/browser_playground.py --mutants    break one formula at a time, and see that a check fails

It fails if a number of playground.js is not the package's, if a handle, a key, the fold, the fit or the link does not
do what it should, if a phone scrolls sideways, or if pictures come too slowly. Nothing is fetched. Screenshots go to
build/browser/. Needs Playwright and Chromium, as browser_panel.py.
"""

import contextlib
import io
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from browser_panel import CHROMIUM_ARGS, OUT, find_chromium, wait_until  # noqa: E402  (a script, not a package)
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import sync_playwright

from planar_helpers import planar, targets
from planar_helpers.elbo import standard_normal_log_density
from planar_helpers.grid import log_mass, plane_grid
from planar_helpers.playground import MODULE, Playground

DESKTOP, PHONE = {"width": 1100, "height": 900}, {"width": 390, "height": 844}
NAMES = "constrainU, prepare, chain, preimages, logDensity, density, energy, logTarget, logMassOfTarget, BASES, " + (
    "lossAndGradient, draws, massOnOneBranch, fromHash"
)
MUTANT = ("", "")  # what is replaced, and by what, in the page that is tested
torch.set_default_dtype(torch.float64)


def spread_of_one_step(constraint: str = "shifted", u: tuple[float, float] = (1.3, 0.6)) -> Playground:
    """A playground with one step."""
    return Playground(torch.tensor([[1.8, 0.8]]), torch.tensor([u]), torch.tensor([0.2]), constraint=constraint)


def open_page(browser: Any, playground: Playground, screen: dict[str, int], hash: str = "", **others: Any) -> Any:
    """Open the page form of a playground from a file, without a network; its errors and requests are kept."""
    page = browser.new_context(viewport=screen, **others).new_page()
    page.failed = []
    page.on("pageerror", lambda error: page.failed.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or page.failed.append(asked.url))
    path = Path(tempfile.mkdtemp(dir=FOLDER)) / "page.html"
    head = '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    # a module's names are its own: this copy hands some out
    hand_out = f"window.planar = {{ {NAMES} }};\nexport default"
    text = playground.html().replace("export default", hand_out).replace(*MUTANT)
    assert hand_out in text
    path.write_text(head + text, encoding="utf-8")
    page.goto(f"{path.as_uri()}{hash}")
    page.wait_for_selector(".planar-plane")
    return page


def differ(name: str, ours: Any, theirs: torch.Tensor) -> str:
    """Say by how much two routes differ, and return what is wrong: more than 1e-9 + 1e-6 |value|, or ""."""
    ours = torch.tensor(ours).reshape(theirs.shape)
    excess = ((ours - theirs).abs() - 1e-6 * theirs.abs()).max().item() if theirs.numel() else 0.0
    largest = (ours - theirs).abs().max().item() if theirs.numel() else 0.0
    print(f"    {name:34} largest difference {largest:.1e} over {theirs.numel()} numbers")
    return "" if excess <= 1e-9 else f"{name}: differs from Python by up to {largest:.1e}"


def random_sets(n: int) -> Iterator[dict[str, Any]]:
    """Draw parameters, and a point to push: K from 0 to 8, all three constraints, some steps long, short or zero."""
    generator = torch.Generator().manual_seed(0)
    for i in range(n):
        K = i % 9
        w, u = 1.2 * torch.randn(2, K, 2, generator=generator)
        if i % 11 == 0 and K:
            w[0] = torch.tensor([0.0, 0.0]) if i % 2 else 1e-3 * w[0]
        b, z0 = torch.randn(K, generator=generator), torch.randn(2, generator=generator)
        constraint = ("shifted", "paper", "none")[i % 3]
        yield {"w": w, "u": u, "b": b, "z0": z0, "constraint": constraint}


def numbers_are_the_packages(browser: Any) -> Iterator[str]:
    """Compare z_K, ladj, û and the density of 500 random parameter sets."""
    page = open_page(browser, spread_of_one_step(), DESKTOP)
    sets = list(random_sets(500))
    found = page.evaluate(
        """sets => sets.map(({z0, z, ...p}) => {
            const steps = planar.prepare(p), log = planar.BASES.gaussian, folds = steps.some(step => step.slack <= 0);
            const end = planar.chain(z0, steps);
            return { zK: end.z, ladj: end.ladj, uHat: p.w.map((w, k) => planar.constrainU(w, p.u[k], p.constraint).u),
                     log_qK: planar.logDensity(end.z, steps, log), elsewhere: planar.logDensity(z0, steps, log),
                     half: p.w.length ? planar.chain(z0, planar.prepare(p, 0.5)) : null,
                     pixel: folds ? null : planar.density(...z0, steps, log) };
        })""",
        [{k: v if isinstance(v, str) else v.tolist() for k, v in one.items()} for one in sets],
    )
    names = ("z_K", "ladj", "û", "half a step", "q_K at z_K", "log q_K at z_K", "q_K elsewhere")
    both = {name: ([], []) for name in names}
    worst = 0.0
    for one, js in zip(sets, found, strict=True):
        z0, w, u, b, constraint = (one[name] for name in ("z0", "w", "u", "b", "constraint"))
        if constraint == "none":
            zK, ladj, u_hat = z0, torch.tensor(0.0), u
            for step in zip(w, u, b, strict=True):
                zK, more = planar.planar_step(zK, *step)
                ladj = ladj + more
        else:
            zK, ladj = planar.planar_chain(z0, w, u, b, constraint)
            u_hat = planar.constrain_u(w, u, constraint) if len(w) else u
            log_qK = standard_normal_log_density(z0) - ladj
            back = planar.planar_inverse(z0, w, u, b, constraint)
            elsewhere = (standard_normal_log_density(back) - planar.planar_chain(back, w, u, b, constraint)[1]).exp()
            both["q_K at z_K"][0].append(math.exp(js["log_qK"]))
            both["q_K at z_K"][1].append(log_qK.exp())
            both["log q_K at z_K"][0].append(js["log_qK"])
            both["log q_K at z_K"][1].append(log_qK)
            both["q_K elsewhere"][0].append(math.exp(js["elsewhere"]))
            both["q_K elsewhere"][1].append(elsewhere)
            worst = max(worst, abs(js["pixel"] - elsewhere.item()) if elsewhere < 0.2 else 0.0)
        pairs = [("z_K", js["zK"], zK), ("ladj", [js["ladj"]], ladj), ("û", js["uHat"], u_hat)]
        if js["half"]:
            z, half_ladj = planar.planar_step(z0, w[0], u_hat[0] / 2, b[0])
            ours = [*js["half"]["z"], js["half"]["ladj"]]
            pairs.append(("half a step", ours, torch.cat([z, half_ladj[None]])))
        for name, ours, theirs in pairs:
            both[name][0].extend(torch.tensor(ours).flatten().tolist())
            both[name][1].extend(theirs.flatten().unbind())
    for name, (ours, theirs) in both.items():
        yield differ(name, ours, torch.stack(theirs))
    print(f"    {'the density of a pixel':34} largest difference {worst:.1e}; a shade is 6e-04")
    yield "" if worst < 1e-4 else f"the pixels' density is off by {worst:.1e}"


def preimages_by_scanning(z: torch.Tensor, w: torch.Tensor, u: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """All points that one step, u as it is, sends to z: changes of sign along a, then bisection; knows no branches."""
    m, target = w @ u, w @ z + b
    a = torch.linspace(target.item() - abs(m.item()) - 1, target.item() + abs(m.item()) + 1, 200_001)
    values = a + m * torch.tanh(a) - target
    at = torch.nonzero(values[1:] * values[:-1] < 0).flatten()
    low, high = a[at], a[at + 1]
    for _ in range(60):
        middle = (low + high) / 2
        same = torch.sign(middle + m * torch.tanh(middle) - target) == torch.sign(low + m * torch.tanh(low) - target)
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    return z - torch.tanh(low)[:, None] * u


def folds_are_summed_over(browser: Any) -> Iterator[str]:
    """Compare the preimages of 100 folded points and the density there with a scan that knows no branches."""
    page = open_page(browser, spread_of_one_step(), DESKTOP)
    generator = torch.Generator().manual_seed(1)
    counts, ours, theirs = set(), [], []
    for _ in range(100):
        w, u, z = 1.5 * torch.randn(3, 2, generator=generator)
        u = u - 2 * w / (w @ w)
        b = torch.randn((), generator=generator)
        points = preimages_by_scanning(z, w, u, b)
        ladj = planar.planar_step(points, w.expand_as(points), u.expand_as(points), b.expand(len(points)))[1]
        found = page.evaluate(
            """([p, z]) => { const steps = planar.prepare(p), log = planar.BASES.gaussian;
                return [planar.preimages(z, steps).length, planar.logDensity(z, steps, log)]; }""",
            [{"w": [w.tolist()], "u": [u.tolist()], "b": [b.item()], "constraint": "none"}, z.tolist()],
        )
        counts.add(found[0])
        if found[0] != len(points):
            yield f"{found[0]} preimages, and a scan finds {len(points)}"
        ours.append(math.exp(found[1]))
        theirs.append((standard_normal_log_density(points) - ladj).exp().sum())
    yield differ("density where the plane folds", ours, torch.stack(theirs))
    yield "" if counts == {1, 3} else f"folds with {counts} preimages, where 1 and 3 were to be seen"


def targets_and_gradients_are_the_packages(browser: Any) -> Iterator[str]:
    """Compare the four targets, their mass, the bases, and the gradient that fitting follows with autograd's."""
    page = open_page(browser, spread_of_one_step(), DESKTOP)
    z = 2.5 * torch.randn(200, 2, generator=torch.Generator().manual_seed(2))
    for i in targets.TARGETS:
        ours = page.evaluate("([z, i]) => z.map(([x, y]) => planar.logTarget(x, y, i))", [z.tolist(), i])
        yield differ(f"log of target {i}", ours, targets.log_target(z, i))
        grid = plane_grid(-6, 6, 1201)
        mass = log_mass(grid, targets.log_target(grid, i))
        ours = page.evaluate("i => planar.logMassOfTarget(i)", i)
        yield "" if abs(ours - mass.item()) < 1e-3 else f"log mass of target {i}: {ours}, by Python {mass.item()}"
    for constraint in ("shifted", "paper", "none"):
        generator = torch.Generator().manual_seed(3)
        w, u = (torch.randn(5, 2, generator=generator).requires_grad_() for _ in range(2))
        b = torch.randn(5, generator=generator).requires_grad_()
        z0 = torch.randn(50, 2, generator=generator)
        zK, ladj = z0, 0.0
        for step in zip(w, u if constraint == "none" else planar.constrain_u(w, u, constraint), b, strict=True):
            zK, more = planar.planar_step(zK, step[0].expand_as(zK), step[1].expand_as(zK), step[2].expand(50))
            ladj = ladj + more
        loss = (standard_normal_log_density(z0) - ladj - targets.log_target(zK, 4)).mean()
        gradients = torch.autograd.grad(loss, (w, u, b))
        state = {"w": w.tolist(), "u": u.tolist(), "b": b.tolist(), "constraint": constraint}
        ours = page.evaluate("([z, p]) => planar.lossAndGradient(z, p, planar.BASES.gaussian, 4)", [z0.tolist(), state])
        for name, theirs in zip("wub", gradients, strict=True):
            difference = (torch.tensor(ours[name]) - theirs).abs().max().item() / theirs.abs().max().item()
            print(f"    gradient towards {name}, {constraint:9}         relative difference {difference:.1e}")
            yield "" if difference < 1e-6 else f"gradient towards {name}, {constraint}: off by {difference:.1e}"
        mass = page.evaluate("planar.logMassOfTarget(4)")
        yield "" if abs(ours["loss"] - mass - loss.item()) < 1e-6 else f"the loss, {constraint}, is not Python's"


def mass_on_one_branch(browser: Any) -> Iterator[str]:
    """Compare the share that one branch holds with an integral over where points land, of the largest term there."""
    page = open_page(browser, spread_of_one_step(), DESKTOP)
    s = -3.6  # one dimension: w = 1.5 along z_1, u = −2.4 along it; over z_2 nothing happens
    ours = page.evaluate(
        """planar.massOnOneBranch(planar.prepare({w: [[1.5, 0]], u: [[-2.4, 0]], b: [0.3], constraint: "none"}),
                                  planar.BASES.gaussian, 400)"""
    )
    z, at = torch.linspace(-8, 8, 400_001), torch.linspace(-6, 6, 600_001)
    a = 1.5 * z + 0.3
    landed, det = (a + s * torch.tanh(a) - 0.3) / 1.5, 1 + s * (1 - torch.tanh(a) ** 2)
    term = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / det.abs()
    turns = [0, *(torch.nonzero(det[1:] * det[:-1] < 0).flatten() + 1).tolist(), len(z)]
    pieces = []  # each piece rises or falls throughout, so its terms can be read off where they land
    for first, last in itertools.pairwise(turns):
        x, y = (values[first:last] if det[first] > 0 else values[first:last].flip(0) for values in (landed, term))
        pieces.append(torch.from_numpy(np.interp(at, x, y, left=0, right=0)))
    theirs = torch.stack(pieces).amax(0).sum().item() * 12 / 600_000
    print(f"    one branch holds at best           {ours:.3f} of the mass, by an integral over z′ {theirs:.3f}")
    yield "" if abs(ours - theirs) < 0.005 and ours < 0.9 else f"mass on one branch: {ours}, by the integral {theirs}"


def state_of(page: Any) -> dict[str, Any]:
    """What the link holds now."""
    page.wait_for_timeout(600)
    return page.evaluate("planar.fromHash(document.querySelector('.planar a').getAttribute('href'))")


def picture(page: Any) -> str:
    return page.evaluate("document.querySelector('.planar-plane').toDataURL()")


def to_screen(page: Any, z: tuple[float, float]) -> tuple[float, float]:
    box = page.locator(".planar-plane").bounding_box()
    return box["x"] + box["width"] * (z[0] / 10 + 0.5), box["y"] + box["height"] * (0.5 - z[1] / 10)


def drag_handle(page: Any, name: str, to: tuple[float, float], steps: int = 5) -> None:
    box = page.locator(f"[data-handle={name}]").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(*to_screen(page, to), steps=steps)
    page.mouse.up()


def handles_are_dragged(browser: Any) -> Iterator[str]:
    """Drag u, w and b, and read where they went."""
    page = open_page(browser, spread_of_one_step(), DESKTOP)
    before = state_of(page)
    old = picture(page)
    drag_handle(page, "u", (2.0, -1.0))
    after = state_of(page)
    w, b = torch.tensor(before["w"][0]), before["b"][0]
    foot = -b * w / (w @ w)  # where the handles sit: the foot of the origin on the line
    if not torch.allclose(foot + torch.tensor(after["u"][0]), torch.tensor([2.0, -1.0]), atol=0.03):
        yield f"u was dragged to (2, −1) from {foot.tolist()}, and is {after['u'][0]}"
    if after["w"] != before["w"] or after["b"] != before["b"] or picture(page) == old:
        yield "dragging u moves w or b, or changes no picture"
    drag_handle(page, "b", (-1.0, 1.0))
    after = state_of(page)
    if abs(torch.tensor(after["w"][0]) @ torch.tensor([-1.0, 1.0]) + after["b"][0]) > 0.06:
        yield "the line does not go through where b was dragged"
    drag_handle(page, "w", (-1.0, 3.0))
    turned = state_of(page)["w"][0]
    if math.hypot(*turned) < 1 or turned == after["w"][0]:
        yield f"w was not turned: {turned}"
    line = page.evaluate("([w, b]) => w[0] * -1 + w[1] * 1 + b", [turned, state_of(page)["b"][0]])
    yield "" if abs(line) < 0.1 else "turning w moved the line away from its handle"
    yield from page.failed


def keys_do_it_too(browser: Any) -> Iterator[str]:
    """Move a handle and the probe by the arrow keys alone, reached by Tab."""
    page = open_page(browser, spread_of_one_step(), DESKTOP)
    before = state_of(page)["u"][0]
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.handle") == "u":
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowUp")
    after = state_of(page)["u"][0]
    moved = [round(new - old, 3) for new, old in zip(after, before, strict=True)]
    yield "" if moved == [0.1, 0.01] else f"ArrowRight and Shift+ArrowUp moved u by {moved}"
    label = page.locator("[data-handle=u]").get_attribute("aria-label")
    yield "" if f"{after[0]:.2f}" in label else f"the handle's label says {label!r}"
    page.locator(".planar-plane").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(400)
    text = page.locator(".planar-probe").inner_text()
    yield "" if text.startswith("At (−0.10, 0.00) the density is") else f"the probe says {text!r}"


def red_share(page: Any) -> float:
    """The share of the plane that is painted as folded."""
    return page.evaluate("""() => { const c = document.querySelector('.planar-plane');
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let red = 0;
        for (let i = 0; i < d.length; i += 4) red += d[i] > 130 && d[i + 1] < 110 && d[i] > 1.6 * d[i + 2];
        return red / (d.length / 4); }""")


def the_fold_is_shown(browser: Any) -> Iterator[str]:
    """Switch û off where u pushes too hard: red, three preimages under the pointer, the mass of one branch; and on."""
    page = open_page(browser, spread_of_one_step(u=(-2.0, -0.6)), DESKTOP)
    page.wait_for_timeout(600)
    yield "" if red_share(page) < 0.01 else "red is shown although û is on"
    page.get_by_label("constraint").select_option("none")
    page.wait_for_timeout(1500)
    yield "" if red_share(page) > 0.05 else f"the fold is not red: {red_share(page):.3f} of the plane"
    status = page.locator(".planar-folds").inner_text()
    yield "" if "the plane folds" in status and "% of the mass" in status else f"the fold's status says {status!r}"
    page.mouse.move(*to_screen(page, (0.8, -2.0)))
    page.wait_for_timeout(300)
    text = page.locator(".planar-probe").inner_text()
    yield "" if text.startswith("3 points land at") and "follows one" in text else f"the probe says {text!r}"
    page.screenshot(path=OUT / "playground_fold.png")
    page.get_by_label("constraint").select_option("shifted")
    page.wait_for_timeout(600)
    yield "" if red_share(page) < 0.01 else "red stays after û is switched on"


def fitting_lowers_the_loss(browser: Any) -> Iterator[str]:
    """Press Learn; the KL divergence falls, the result follows the target; Python measures it on a grid."""
    page = open_page(browser, spread_of_one_step(), DESKTOP)
    page.get_by_role("button", name="Learn").click()
    text = page.get_by_text("distance to the target")
    text.wait_for(timeout=5000)
    first = float(text.inner_text().split("≈ ")[1].split(" nats")[0])
    page.wait_for_timeout(500)
    page.screenshot(path=OUT / "playground_fit_begins.png")
    wait_until(lambda: "3000 rounds" in text.inner_text(), 90, "the fit to end")
    last = float(text.inner_text().split("≈ ")[1].split(" nats")[0].replace("−", "-"))
    state = state_of(page)
    page.screenshot(path=OUT / "playground_fit.png")
    w, u, b = (torch.tensor(state[name]) for name in "wub")
    grid = plane_grid(-6, 6, 401)
    z0 = planar.planar_inverse(grid, w, u, b)
    log_qK = standard_normal_log_density(z0) - planar.planar_chain(z0, w, u, b)[1]
    log_p = targets.log_target(grid, state["target"])
    exact = (log_qK.exp() * (log_qK - log_p + log_mass(grid, log_p))).sum().item() * (12 / 400) ** 2
    print(f"    KL falls from {first:.2f} to {last:.2f} as shown; by Python's grid it is {exact:.2f}")
    yield "" if last < 0.3 * first and abs(last - exact) < 0.1 else f"KL from {first} to {last}, exactly {exact}"


def the_link_holds_the_state(browser: Any) -> Iterator[str]:
    """Follow the link in a new page, and come to the same state and picture; a broken link is ignored."""
    page = open_page(browser, spread_of_one_step(), DESKTOP)
    page.get_by_role("button", name="Chain").click()
    page.wait_for_timeout(6500)
    state, link = state_of(page), page.locator(".planar a").get_attribute("href")
    other = open_page(browser, spread_of_one_step(), DESKTOP, hash=link)
    same = state and state_of(other) == state and len(state["b"]) == 4
    yield "" if same else "the link does not lead to the same state"
    page.mouse.move(0, 0)
    shown, again = (torch.tensor(p.evaluate(
        "[...document.querySelector('.planar-plane').getContext('2d').getImageData(0, 0, 400, 400).data]"
    ), dtype=torch.float64) for p in (page, other))  # fmt: skip
    yield "" if (shown - again).abs().mean() < 3 else "the link's picture is another one"
    for hash in ("#planar=xyz", "#planar=" + "W10=", "#something"):
        broken = open_page(browser, spread_of_one_step(), DESKTOP, hash=hash)
        yield "" if len(state_of(broken)["b"]) == 1 and not broken.failed else f"{hash} breaks the page"


def a_phone_holds_it(browser: Any) -> Iterator[str]:
    """At 390 px with touch: nothing scrolls sideways, no control is small or hidden, a finger drags and taps."""
    page = open_page(
        browser, spread_of_one_step(), PHONE, has_touch=True, is_mobile=True, device_scale_factor=2,
    )  # fmt: skip
    page.wait_for_timeout(500)
    width = page.evaluate("document.documentElement.scrollWidth")
    yield "" if width <= 390 else f"the page is {width} px wide on a phone"
    small = page.evaluate("""[...document.querySelectorAll('.planar button:not(.planar-handle), .planar select')]
        .filter(e => e.offsetHeight && e.offsetHeight < 36).map(e => e.textContent)""")
    yield "" if not small else f"too low for a finger: {small}"
    box = page.locator("[data-handle=u]").bounding_box()
    x, y = box["x"] + 15, box["y"] + 15
    before = state_of(page)["u"]
    touch = page.context.new_cdp_session(page)
    point = lambda x, y: [{"x": x, "y": y}]  # noqa: E731
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": point(x, y)})
    for i in range(1, 6):
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": point(x, y + 12 * i)})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    after = state_of(page)["u"]
    yield "" if after[0][1] < before[0][1] - 1 else f"a finger moved u from {before} to {after}"
    yield "" if page.evaluate("scrollY") == 0 else "the page scrolled while a finger dragged a handle"
    page.touchscreen.tap(*to_screen(page, (-2.0, -2.0)))
    page.wait_for_timeout(300)
    yield "" if page.locator(".planar-probe").inner_text().startswith("At (") else "a tap shows no numbers"
    page.screenshot(path=OUT / "playground_phone.png", full_page=True)


def pictures_come_fast(browser: Any) -> Iterator[str]:
    """Drag a handle of the last of eight steps for 60 pictures: how many a second, and processor time for one.

    The second does not depend on what else the machine does; 30 a second leave 33 ms for each.
    """
    generator = torch.Generator().manual_seed(4)
    w, u = torch.randn(2, 8, 2, generator=generator)
    page = open_page(browser, Playground(w, 0.5 * u, torch.zeros(8)), DESKTOP)
    page.wait_for_timeout(800)
    clock = page.context.new_cdp_session(page)
    clock.send("Performance.enable", {"timeDomain": "threadTicks"})
    spent = lambda: {m["name"]: m["value"] for m in clock.send("Performance.getMetrics")["metrics"]}  # noqa: E731
    drag = """async count => {
        const handle = document.querySelector('[data-handle=u]'), root = document.querySelector('.planar');
        const plane = document.querySelector('.planar-plane').getBoundingClientRect();
        handle.setPointerCapture = () => {}; handle.hasPointerCapture = () => true;
        const move = (t) => handle.dispatchEvent(new PointerEvent('pointermove', { clientX: plane.left + plane.width *
            (0.5 + 0.2 * Math.cos(t / 300)), clientY: plane.top + plane.height * (0.5 + 0.2 * Math.sin(t / 300)) }));
        const [begun, before] = [performance.now(), +root.dataset.frames];
        while (root.dataset.frames - before < count) {
            move(performance.now());
            await new Promise(requestAnimationFrame);
        }
        return [root.dataset.frames - before, performance.now() - begun]; }"""
    page.evaluate(drag, 60)  # warm
    before = spent()
    pictures, wall = page.evaluate(drag, 60)
    each = 1000 * (spent()["TaskDuration"] - before["TaskDuration"]) / pictures
    print(f"    {1000 * pictures / wall:.0f} pictures a second; {each:.0f} ms of processor time for each, K = 8")
    yield "" if each < 33 else f"a picture takes {each:.0f} ms: fewer than 30 a second"


CHECKS: list[Callable[[Any], Iterator[str]]] = [
    numbers_are_the_packages, folds_are_summed_over, targets_and_gradients_are_the_packages, mass_on_one_branch,
    handles_are_dragged, keys_do_it_too, the_fold_is_shown, fitting_lowers_the_loss, the_link_holds_the_state,
    a_phone_holds_it, pictures_come_fast,
]  # fmt: skip


# One change of playground.js each, of a text that stands there once, and the check that must notice it.
MUTANTS: list[tuple[str, str, Callable[[Any], Iterator[str]]]] = [
    ("\"paper\" ? s : s + LOG_E_MINUS_1", "\"none\" ? s : s + LOG_E_MINUS_1", numbers_are_the_packages),
    ("1 / Math.E : 1 - 1 / Math.E", "1 / Math.E : 1 / Math.E", numbers_are_the_packages),
    ("scale < 1e-120", "scale < 1e-2", numbers_are_the_packages),
    ("h * h + slack / Math.cosh(a) ** 2", "1 + slack / Math.cosh(a) ** 2", numbers_are_the_packages),
    ("ladj += Math.log(Math.abs(", "ladj -= Math.log(Math.abs(", numbers_are_the_packages),
    ("slack: 1 + share * (slack - 1)", "slack", numbers_are_the_packages),
    ("[...steps].reverse()", "[...steps]", numbers_are_the_packages),
    ("scale *= h * h + slack * (1 - h * h)", "scale *= h * h + slack", numbers_are_the_packages),
    ("logAddExp(sum, logBase(...p.z) - p.ladj)", "Math.max(sum, logBase(...p.z) - p.ladj)", folds_are_summed_over),
    ("if (Math.abs(target) < top)", "if (Math.abs(target) < top / 2)", folds_are_summed_over),
    ("half(x - 1, 0.6)", "half(x - 1, 0.5)", targets_and_gradients_are_the_packages),
    ("- 4, 0) / 0.2", "- 4, 0) / 0.3", targets_and_gradients_are_the_packages),
    ("(2 * (steps[k].slack - 1) * h)", "((steps[k].slack - 1) * h)", targets_and_gradients_are_the_packages),
    ("along * (slope - 1)", "along * slope", targets_and_gradients_are_the_packages),
    (">= best - 1e-6", ">= best - 1", mass_on_one_branch),
    ("from, s.b[k])", "from.map((c) => c / 2), s.b[k])", handles_are_dragged),
    ("setStep(k, w, s.u[k], -dot(w, anchors[k]))", "setStep(k, w, s.u[k], dot(w, anchors[k]))", handles_are_dragged),
    ("const red = found.length > 1 ? 0.45 : 0", "const red = 0", the_fold_is_shown),
    ("fine && named && K <= 32", "named && K <= 0", the_link_holds_the_state),
]  # fmt: skip


def unnoticed(browser: Any) -> Iterator[str]:
    """Make each change in turn, and yield those with which its check still passes."""
    global MUTANT
    module = MODULE.read_text(encoding="utf-8")
    for old, new, check in MUTANTS:
        if module.count(old) != 1:
            yield f"{old!r} stands {module.count(old)} times in {MODULE.name}"
            continue
        MUTANT = (old, new)
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                noticed = next(filter(None, check(browser)), "")
            except (PlaywrightError, TimeoutError, ValueError) as error:  # it broke the page: noticed, too
                noticed = str(error).splitlines()[0]
        for context in browser.contexts:
            context.close()
        print(f"    {old!r} -> {new!r}: {noticed[:100] or 'NOT NOTICED'}", flush=True)
        yield "" if noticed else f"{check.__name__} does not notice {old!r} -> {new!r}"
    MUTANT = ("", "")


def main() -> int:
    """Run the checks; return 1 if anything is wrong."""
    checks = [check for check in CHECKS if all(word in check.__name__ for word in sys.argv[1:])]
    checks = [unnoticed] if sys.argv[1:] == ["--mutants"] else checks
    failed = 0
    OUT.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), headless=True, args=CHROMIUM_ARGS)
        for check in checks:
            start = time.monotonic()
            print(check.__name__.replace("_", " "), flush=True)
            for line in filter(None, check(browser)):
                print(f"    WRONG: {line}", flush=True)
                failed += 1
            print(f"    {time.monotonic() - start:.0f} s", flush=True)
            for context in browser.contexts:
                context.close()
        browser.close()
    assert MODULE.is_file() and checks, f"no check has {sys.argv[1:]} in its name"
    print(f"playground: {failed} things wrong" if failed else "playground: as it should be")
    return 1 if failed else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="planar-playground-") as FOLDER:
        sys.exit(main())
