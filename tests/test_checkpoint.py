"""A run's name follows what trains it and nothing else; its files are whole, refused if damaged or another's."""

import hashlib
import inspect
import io
import linecache
import os
import pickle
import random
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import planar_helpers.data
import planar_helpers.run
import planar_helpers.vae
from planar_helpers import elbo, planar, train
from planar_helpers.checkpoint import Checkpoint, Code, Run, bare, bytecode, run_name
from planar_helpers.data import Images
from planar_helpers.train import fit, run_settings, train_or_load
from planar_helpers.vae import PlanarVAE

FIT = {**train.FIT_DEFAULTS, "epochs": 3, "seed": 0}
PACKAGE = Path(planar_helpers.__file__).parent
MODULES = (planar, elbo, planar_helpers.vae, planar_helpers.data, planar_helpers.run, train)
# Used by what trains, and without a say in its numbers: printing, files, modes, and all that begins with "check".
COMPUTES_NOTHING = {
    "_progress_bar", "_history", "_as_terms", "Checkpoint", "run_settings", "evaluating", "_own_precision",
    "FlowPosterior", "_undisturbed", "undisturbed", "History", "shear",
}  # fmt: skip


@pytest.fixture
def few(digits: Images) -> Images:
    return Images(digits.train[:120], digits.train_labels[:120], digits.test[:50], digits.test_labels[:50], "few")


def fresh(**changes: Any) -> PlanarVAE:
    torch.manual_seed(7)
    return PlanarVAE(**{"hidden": 10, **changes})


def name(few: Images, model: PlanarVAE | None = None, **changes: Any) -> str:
    model = model or fresh()
    return run_name(run_settings(model, few, train.check_fit({**FIT, **changes})))


# --- the name -----------------------------------------------------------------------------------------------------


def test_every_setting_the_dtype_and_the_pixels_are_in_the_name(few: Images) -> None:
    inverted, other = few._replace(train=255 - few.train), few._replace(test=255 - few.test)
    names = [
        name(few),
        name(few, epochs=3, schedule="cosine"),
        name(few, epochs=4, schedule="cosine"),
        *(
            name(few, **{key: value})
            for key, value in (
                ("batch_size", 99),
                ("lr", 2e-3),
                ("weight_decay", 0),
                ("seed", 1),
                ("clip", 1.0),
                ("warmup", 1),
                ("binarise", True),
            )  # fmt: skip
        ),
        *(
            name(few, fresh(**{key: value}))
            for key, value in (
                ("hidden", 11),
                ("hidden", (10, 10)),
                ("D", 3),
                ("K", 2),
                ("constraint", "paper"),
                ("family", "translation"),
                ("dropout", 0.1),
            )  # fmt: skip
        ),
        name(few, fresh().double()),
        *(name(images) for images in (inverted, other, few._replace(name="other"))),
    ]
    assert len(set(names)) == len(names)
    assert name(few, epochs=4) == name(few) and names[0].startswith("K3-shifted-")  # a shorter run is its start
    labels = few._replace(train_labels=few.train_labels + 1, test_labels=None)
    assert name(labels) == name(few) == name(few, lr=0.001, weight_decay=0.00001)
    assert name(few, weight_decay=0) == name(few, weight_decay=0.0)


def test_comments_docstrings_blank_lines_and_line_endings_are_not_in_the_name() -> None:
    plain = "def f(x):\n    y = '# no comment'\n    return x + 1\n"
    dressed = '''    # above
    def f(x):  # beside
        """Doc.

        More.
        """

        y = '# no comment'
        # inside
        return x + 1
    '''
    assert bare(dressed) == bare(plain) == bare(plain.replace("\n", "\r\n")) == plain.rstrip()
    assert bare("class A:\n    '''Doc.'''\n\n    a: int  # one\n") == "class A:\n    a: int"
    for change in (("+ 1", "+ 2"), ("'# no", "'# yes"), ("    return", "    y = 1\n    return"), ("(x)", "(x=1)")):
        assert bare(plain.replace(*change)) != bare(plain)


def other_pythons() -> Iterator[str]:
    for minor in range(11, 16):
        yield from map(str, Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        yield f"python3.{minor}"


def test_the_name_is_the_same_under_every_python() -> None:
    files = sorted(str(PACKAGE / f"{module}.py") for module in ("planar", "elbo", "vae", "train", "data", "run"))
    code = "import ast, hashlib, io, sys, textwrap, tokenize\nfrom pathlib import Path\n" + inspect.getsource(bare)
    code += "\ntexts = [bare(Path(name).read_text(encoding='utf-8')) for name in sys.argv[1:]]"
    code += "\nprint(hashlib.sha256('\\n'.join(texts).encode()).hexdigest())"
    expected = hashlib.sha256("\n".join(bare(Path(f).read_text(encoding="utf-8")) for f in files).encode()).hexdigest()
    for python in other_pythons():
        try:
            done = subprocess.run([python, "-c", code, *files], capture_output=True, text=True, check=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            if getattr(error, "returncode", 127) in (126, 127):  # not installed
                continue
            raise
        assert done.stdout.strip() == expected, python


def test_all_that_computes_is_in_the_name() -> None:
    """Walk the names that the captured functions use, and find none of this package that is not captured."""
    captured = train.CODE._captured
    names = {part for qualified in captured for part in qualified.split(".")}
    names |= COMPUTES_NOTHING | set(vars(elbo.ElboTerms))  # captured as a whole
    unknown = set()
    for qualified, layers in captured.items():
        uses = set().union(*(used_names(layer) for layer in layers if isinstance(layer, types.CodeType)))
        for use in sorted(uses - names):
            found = [vars(module)[use] for module in MODULES if use in vars(module)]
            ours = any(isinstance(one, int | float) or in_package(one) for one in found)
            methods = any(use in vars(owner) for owner in (planar_helpers.vae.FlowPosterior, PlanarVAE))
            if (ours or methods and not hasattr(torch.Tensor, use)) and not use.lstrip("_").startswith("check"):
                unknown.add((qualified, use))
    assert not unknown, f"neither in train.CODE nor known to compute nothing: {unknown}"
    assert {"planar_chain", "_constrain", "_det", "FlowPosterior.rsample", "fit", "drop_tiny"} <= set(captured)


def used_names(code: types.CodeType) -> set[str]:
    inner = [used_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


def in_package(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("planar_helpers")


def test_what_decides_nothing_is_not_in_the_name() -> None:
    for method in (
        "PlanarVAE.sample",
        "PlanarVAE.check_images",
        "FlowPosterior.log_prob",
        "planar_inverse",
        "check_int",
    ):
        assert method not in train.CODE._captured


def module_from(source: str, module: str = "code_of_a_test") -> types.ModuleType:
    """A module that inspect can read, as if it had been imported from a file."""
    made = types.ModuleType(module)
    made.__file__ = filename = f"<{module} {hashlib.md5(source.encode()).hexdigest()}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), vars(made))
    sys.modules[module] = made
    return made


@pytest.fixture
def toy() -> Iterator[Callable[[str], Code]]:
    def code(source: str) -> Code:
        module = module_from(source)
        return Code(module.f, module.A, module.A.g, C=module.C)

    yield code
    sys.modules.pop("code_of_a_test", None)


SOURCE = "C = 2.0\ndef f(x=1):\n    return x\nclass A:\n    a = 1\n    def g(self):\n        return C\n"


def test_every_captured_line_and_constant_changes_the_version(toy: Callable[[str], Code]) -> None:
    before = toy(SOURCE).version()
    assert toy("# about\n" + SOURCE.replace("return x", "return x  # x")).version() == before
    for change in (
        ("C = 2.0", "C = 3.0"),
        ("x=1", "x=2"),
        ("return x", "return -x"),
        ("a = 1", "a = 2"),
        ("return C", "return 2 * C"),
    ):
        assert toy(SOURCE.replace(*change)).version() != before, change


def test_what_was_moved_is_an_error_and_no_empty_hash() -> None:
    with pytest.raises((AttributeError, TypeError, OSError)):
        Code(getattr(planar, "moved_away", None))


@pytest.mark.parametrize(
    ("owner", "what"),
    [
        (planar, "planar_chain"), (planar_helpers.vae, "planar_chain"), (planar, "_constrain"), (planar, "_det"),
        (planar_helpers.vae, "bernoulli_log_likelihood"), (elbo, "gaussian_log_density"), (PlanarVAE, "elbo_terms"),
        (PlanarVAE, "_encode"), (PlanarVAE, "__init__"), (planar_helpers.vae.FlowPosterior, "rsample"),
        (train, "to_float"), (train, "drop_tiny"), (train, "mean_terms"), (train, "seed_all"), (train, "PlanarVAE"),
        (planar_helpers.vae, "FlowPosterior"), (planar_helpers.vae, "ElboTerms"),
    ],
)  # fmt: skip
def test_replaced_code_is_refused_and_nothing_is_filed(
    few: Images, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: Any, what: str
) -> None:
    original = vars(owner)[what]
    if isinstance(original, type):
        replacement: Any = type(what, (original,), {"elbo_terms": lambda self, x: None, "rsample": None, "elbo": None})
    else:

        def replacement(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs)

        replacement.__wrapped__ = original
    monkeypatch.setattr(owner, what, replacement)
    with pytest.raises(RuntimeError, match=f"{what}.* is not what was imported"):
        train_or_load(few, 1, hidden=10, progress=False)
    with pytest.raises(RuntimeError, match=f"{what}.* is not what was imported"):
        train.CODE.version()
    assert list(tmp_path.iterdir()) == []


def test_changed_constants_defaults_and_code_in_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, constant in ((planar, "LOG_E_MINUS_1"), (elbo, "LOG_2PI")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, constant, 0.5)
            with pytest.raises(RuntimeError, match=constant):
                train.CODE.version()
    with monkeypatch.context() as patch:
        patch.setattr(planar._det, "__code__", (lambda a, slack: a).__code__)
        with pytest.raises(RuntimeError, match="_det in planar_helpers.planar"):
            train.CODE.version()
    with monkeypatch.context() as patch:
        patch.setattr(inspect.unwrap(train.drop_tiny), "__defaults__", (1.0,))
        with pytest.raises(RuntimeError, match="drop_tiny"):
            train.CODE.version()
    train.CODE.version()


def test_files_that_change_after_the_import_do_not_change_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = train.CODE.version()
    monkeypatch.setattr(inspect, "getsource", lambda _: pytest.fail("read again"))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("read again"))
    assert train.CODE.version() == before


def test_training_without_a_file_needs_no_name(few: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = planar.planar_chain
    monkeypatch.setattr(planar_helpers.vae, "planar_chain", lambda *a, **k: chain(*a, **k))
    fit(fresh(), few, epochs=1, progress=False)  # a reader's own chain: nothing is filed


def test_bytecode_tells_wrappers_apart() -> None:
    def f() -> int:
        return 1

    class Wrapper:
        __wrapped__ = staticmethod(f)

    assert bytecode(f) == bytecode(f) and bytecode(f) != bytecode(Wrapper()) and bytecode(2.0) != bytecode(3.0)


# --- the files ----------------------------------------------------------------------------------------------------


class Attack:
    """A pickle that creates a file when it is read without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_hostile_file_is_refused_and_not_run(few: Images, tmp_path: Path, how: str) -> None:
    target, path = tmp_path / "created by the attack", tmp_path / "run.pt"
    fit(fresh(), few, epochs=1, checkpoint=path, progress=False)
    state = {**torch.load(path, weights_only=True), "extra": Attack(target)}
    torch.save(state, path) if how == "torch" else path.write_bytes(pickle.dumps(state, protocol=2))
    with pytest.raises(ValueError, match=r"run\.pt is damaged: delete it"):
        fit(fresh(), few, epochs=2, checkpoint=path, progress=False)
    assert not target.exists()


@pytest.mark.parametrize("part", ["settings", "means", "rng", "model", "optimizer"])
def test_a_file_that_lacks_a_part_is_damaged(few: Images, tmp_path: Path, part: str) -> None:
    path = tmp_path / "run.pt"
    fit(fresh(), few, epochs=1, checkpoint=path, progress=False)
    whole = torch.load(path, weights_only=True)
    for changed in ({k: v for k, v in whole.items() if k != part}, {**whole, part: 0}, {**whole, part: {}}):
        torch.save(changed, path)
        with pytest.raises(ValueError, match=r"run\.pt is (damaged|of another run)"):
            fit(fresh(), few, epochs=2, checkpoint=path, progress=False)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK", b"\x80\x02}q\x00."])
def test_a_damaged_file_is_an_error_that_names_it(few: Images, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.pt is damaged: delete it"):
        fit(fresh(), few, epochs=1, checkpoint=path, progress=False)
    train_or_load(few, 1, hidden=10, progress=False)
    (saved,) = (tmp_path / "runs").glob("*.pt")
    half = saved.read_bytes()
    saved.write_bytes(half[: len(half) // 2])
    with pytest.raises(ValueError, match=r"-1\.pt is damaged: delete it"):
        train_or_load(few, 1, hidden=10, progress=False)


@pytest.fixture(scope="module")
def whole(digits: Images, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of about 60 kB."""
    path = tmp_path_factory.mktemp("whole") / "run.pt"
    small = digits._replace(train=digits.train[:20], test=digits.test[:5])
    fit(fresh(hidden=2, K=1), small, epochs=1, checkpoint=path, progress=False)
    return path.read_bytes()


def read(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    model = fresh(hidden=2, K=1)
    Checkpoint(path).resume({}, 1, model, torch.optim.Adam(model.parameters()), {"train": [], "test": []})


def test_a_file_cut_anywhere_is_damaged(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(ValueError, match="of another run"):
        read(path, whole)
    for length in (*range(0, 2000, 97), *range(2000, len(whole), 1999), len(whole) - 1):
        with pytest.raises(ValueError, match=r"run\.pt is damaged: delete it"):
            read(path, whole[:length])


def test_a_changed_byte_anywhere_in_the_weights_is_damage(whole: bytes, tmp_path: Path) -> None:
    for place in range(5000, len(whole) - 5000, 4999):
        changed = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        with pytest.raises(ValueError, match=r"run\.pt is damaged: delete it"):
            read(tmp_path / "run.pt", changed)


@pytest.mark.filterwarnings("ignore")
def test_no_bytes_at_all_get_another_error(whole: bytes, tmp_path: Path) -> None:
    generator, path = random.Random(0), tmp_path / "run.pt"
    old_form = io.BytesIO()
    torch.save({"a": torch.ones(3)}, old_form, _use_new_zipfile_serialization=False)
    for original in (whole, whole[-900:], old_form.getvalue(), b"\x80\x02" + bytes(40)):
        for _ in range(60):
            changed = bytearray(original)
            for _ in range(generator.choice((1, 3, 30))):
                changed[-generator.randrange(1, min(len(changed), 900))] = generator.randrange(256)
            with pytest.raises(ValueError, match=r"run\.pt is (damaged|of another run)"):
                read(path, bytes(changed))


def test_what_is_no_file_is_refused_before_an_epoch_is_trained(
    few: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_progress_bar", lambda *_: pytest.fail("trained"))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, str(tmp_path), "", "."):
        with pytest.raises(ValueError, match="checkpoint must name a file, got "):
            fit(fresh(), few, epochs=1, checkpoint=folder, progress=False)
    for wrong in (b"run.pt", 3, False, ["run.pt"]):
        with pytest.raises(TypeError, match="checkpoint must be a path, got "):
            fit(fresh(), few, epochs=1, checkpoint=wrong, progress=False)


def test_a_file_of_another_run_is_refused_and_says_what_differs(few: Images, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    fit(fresh(), few, epochs=2, checkpoint=path, progress=False)
    for change, message in (
        ({"lr": 0.002}, "lr is 0.001 there, 0.002 here"),
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"schedule": "cosine"}, "schedule is 'constant' there, 'cosine' here"),
        ({"epochs": 1}, "has 2 epochs, more than the 1 asked for"),
    ):
        with pytest.raises(ValueError, match=r"checkpoint run\.pt is of another run: .*" + message):
            fit(fresh(), few, **{"epochs": 3, **change}, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="data is"):
        fit(fresh(), few._replace(train=255 - few.train), epochs=3, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="constraint is 'shifted' there, 'paper' here"):
        fit(fresh(constraint="paper"), few, epochs=3, checkpoint=path, progress=False)
    runs = tmp_path / "runs"
    train_or_load(few, 1, hidden=10, progress=False)
    train_or_load(few, 1, hidden=10, progress=False, seed=1)
    one, other = sorted(runs.glob("*.pt"))
    other.write_bytes(one.read_bytes())  # a file under a wrong name
    one.write_bytes(other.read_bytes())
    refused = 0
    for seed in (0, 1):
        try:
            train_or_load(few, 1, hidden=10, seed=seed, progress=False)
        except ValueError as error:
            assert "of another run: seed is" in str(error)
            refused += 1
    assert refused == 1


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    Checkpoint(path).keep({"a": 1}, 1)
    with pytest.raises(AttributeError):
        Checkpoint(path).keep({"a": lambda: 0}, 2)  # cannot be pickled
    assert torch.load(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write, seen = tmp_path / "model.pt", Path.write_bytes, []
    Checkpoint(path).keep({"a": 1}, 1)

    def look_while_writing(where: Path, content: bytes) -> None:
        write(where, content[: len(content) // 2])
        seen.append(torch.load(path))
        write(where, content)

    monkeypatch.setattr(Path, "write_bytes", look_while_writing)
    Checkpoint(path).keep({"a": 2}, 1)
    assert seen == [{"a": 1}] and torch.load(path) == {"a": 2}


def test_equal_runs_are_equal_files(few: Images, tmp_path: Path) -> None:
    for path in (tmp_path / "a.pt", tmp_path / "b.pt"):
        fit(fresh(), few, epochs=1, checkpoint=path, progress=False)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_a_class_shares_a_folder(few: Images, tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        train_or_load(few, 1, hidden=10, progress=False)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "runs").iterdir()} == {"0o664"}


def test_files_that_are_none_of_the_run_are_left_alone(tmp_path: Path) -> None:
    run = Run(tmp_path, "K3-shifted-0123456789", asked=5)
    for other in ("K3-shifted-0123456789-x.pt", "K3-shifted-0123456789-.unfinished", "K3-shifted-other-4.unfinished"):
        (tmp_path / other).touch()
    run.keep({"settings": {}}, 5)
    assert run.find(5) == tmp_path / "K3-shifted-0123456789-5.pt" and len(list(tmp_path.iterdir())) == 4


def test_what_a_run_killed_before_its_last_tidying_left_goes(tmp_path: Path) -> None:
    run = Run(tmp_path, "K3-shifted-0123456789", asked=5)
    run.keep({"settings": {}}, 5)
    for epochs in (4, 6):  # the second is of a longer run
        run.finished(epochs).with_suffix(".unfinished").touch()
    assert run.find(5) == run.finished(5)
    assert {path.name[-12:] for path in tmp_path.iterdir()} == {"3456789-5.pt", "6.unfinished"}


def test_a_run_waits_while_another_holds_its_lock(tmp_path: Path) -> None:
    run, entered = Run(tmp_path, "K3-shifted-0123456789", asked=5), threading.Event()

    def enter() -> None:
        with run.lock():
            entered.set()

    with FileLock(tmp_path / "K3-shifted-0123456789.lock"):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.2)
    thread.join(10)
    assert entered.is_set() and run.writable


def test_a_write_that_fails_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run, tried = Run(tmp_path, "K3-shifted-0123456789", asked=5), []

    def disk_full(path: Path, content: bytes) -> None:
        tried.append(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    for epochs in (1, 2, 3):
        run.keep({"settings": {}}, epochs)
    said = f"{tmp_path} cannot be written to (No space left on device): what is trained from here on is not kept\n"
    assert capsys.readouterr().out == said and len(tried) == 1 and list(tmp_path.iterdir()) == []


def test_another_process_gives_the_same_name_and_reloaded_code_is_refused() -> None:
    code = (
        "import importlib, planar_helpers.train as t, planar_helpers.planar as p\n"
        "print(t.CODE.version()); importlib.reload(p); print(t.CODE.version())\n"  # the same code again
        "source = open(p.__file__, encoding='utf-8').read().replace('h**2 + slack', 'h**2 - slack')\n"
        "exec(compile(source, p.__file__, 'exec'), vars(p))\n"  # what reload does after an edit
        "try: t.CODE.version()\nexcept RuntimeError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    one, two, refusal = done.stdout.splitlines()
    assert one == two == train.CODE.version()
    assert refusal.startswith("_det in planar_helpers.planar is not what was imported")
