"""Tasks are found by name, from files and entry points, and only the one asked for is imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from hfft import registry
from hfft.errors import InputError

TASKS = Path(__file__).parents[1] / "tasks"


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that has our own tasks, and forgets what a test adds."""
    for name in registry.entries():
        registry.get(name)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def install(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, module: str, code: str
) -> None:
    """As if a package had been installed that has this module and names it as a task."""
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, module, raising=False)
    points = [EntryPoint(name, module, "hfft.tasks")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


def new_task(name: str) -> str:
    return f"from hfft.registry import register\n\n\n@register({name!r})\nclass Other:\n    pass\n"


def test_listing_imports_no_task_and_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys\n"
        "from hfft.registry import entries\n"
        "print(*entries())\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic', 'numpy'}\n"
        "print(*[m for m in sys.modules if m in heavy or m.startswith('hfft.tasks')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, imported = done.stdout.split("\n")[:2]
    assert "image-classification" in names.split()
    assert imported == ""


def test_every_file_is_listed_under_its_name_with_the_first_line_of_its_docstring() -> None:
    own = {n: e for n, e in registry.entries().items() if e.module.startswith("hfft.tasks.")}
    files = {path.stem for path in TASKS.glob("*.py") if path.stem != "__init__"}
    assert {entry.module for entry in own.values()} == {f"hfft.tasks.{stem}" for stem in files}
    assert own["image-classification"].summary.startswith("Image to class")
    assert all(entry.summary for entry in own.values())


def test_every_listed_task_registers_the_name_it_is_listed_under() -> None:
    for name in registry.entries():
        assert registry.get(name).name == name


def test_name_that_is_taken_is_refused() -> None:
    taken = registry.get("image-classification")

    class Mine:
        name: str

    with pytest.raises(ValueError, match=f"is taken by {taken.__module__}.{taken.__name__}"):
        registry.register("image-classification")(Mine)


def test_second_copy_of_a_task_is_refused() -> None:
    taken = registry.get("image-classification")
    copy: Any = type(taken.__name__, (), {"__qualname__": taken.__qualname__, "__module__": "copy"})
    with pytest.raises(ValueError, match=f"is registered by {taken.__module__} already"):
        registry.register("image-classification")(copy)


@pytest.mark.parametrize("name", ["", "Image", "image_classification", "image-", "a b", "-a"])
def test_bad_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="lower-case words joined by dashes"):
        registry.register(name)


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        registry.get("image-clasification")
    assert str(caught.value) == (
        "there is no task 'image-clasification'; did you mean 'image-classification'?"
    )


# Third parties


def test_entry_point_adds_a_task_that_is_imported_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, "odd-task", "odd_module", new_task("odd-task"))
    assert registry.entries()["odd-task"].module == "odd_module"
    assert "odd_module" not in sys.modules
    assert registry.get("odd-task").__module__ == "odd_module"


def test_entry_point_under_a_name_of_ours_is_an_error_naming_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, "image-classification", "odd_module", "")
    with pytest.raises(InputError) as caught:
        registry.entries()
    assert "both hfft.tasks.image_classification and odd_module" in str(caught.value)


def test_module_that_registers_another_name_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, "odd-task", "odd_module", new_task("other-task"))
    with pytest.raises(InputError, match="odd_module does not register that name"):
        registry.get("odd-task")


def test_missing_requirement_of_a_task_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, "odd-task", "odd_module", "import no_such_package_here\n")
    with pytest.raises(InputError, match="'odd-task': its module odd_module needs no_such_package"):
        registry.get("odd-task")


def test_folder_of_tasks_refuses_to_be_imported_under_another_name() -> None:
    spec = importlib.util.spec_from_file_location("tasks", TASKS / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"import this package as hfft\.tasks, not as tasks"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
