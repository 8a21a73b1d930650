"""Saved datasets and those of the Hub are read, and what can't be is said in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from .data_files import IMAGES, complaint, in_memory, lines, load, pictures, rows, save, table


def test_saved_dataset_with_images_in_its_rows_is_read(tmp_path: Path) -> None:
    paths = [str(save(tmp_path / f"{n}.png")) for n in range(6)]
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["z", "a"])}
    )
    columns = {"img": paths, "label": [0, 1] * 3}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    for path in paths:
        Path(path).unlink()
    data = load(tmp_path / "saved", IMAGES)
    assert data.labels == ["z", "a"]
    assert data.splits["train"][0]["image"]["bytes"]


def test_saved_dict_is_read_by_split(tmp_path: Path) -> None:
    splits = {"train": in_memory("a", "b"), "test": in_memory("b", "a", count=4)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved", test="test")
    assert data.splits["test"]["label"][:] == [1, 0, 1, 0]


def test_declared_class_without_an_example_is_an_error(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    columns = {"text": ["x"] * 4, "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    assert 'no example of "c"' in complaint(tmp_path / "saved")


def test_damaged_saved_dataset_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    assert "data.path: can't load" in complaint(tmp_path)


def test_hub_dataset_is_asked_for_where_nothing_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def hub(path: str, subset: str | None) -> datasets.DatasetDict:
        asked.append((path, subset))
        return datasets.DatasetDict({"train": in_memory("a", "b")})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load("someone/some_data").labels == ["a", "b"]
    assert load("someone/some_data", subset="part").labels == ["a", "b"]
    assert asked == [("someone/some_data", None), ("someone/some_data", "part")]


@pytest.fixture
def hub_of_subsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset of two configurations, as datasets itself reads one from the Hub."""
    folder = tmp_path / "hub"
    for name in ("mrpc", "cola"):
        lines(folder / name / "train.jsonl", [{"text": name, "label": n % 2} for n in range(20)])
    parts = "".join(f"- config_name: {n}\n  data_dir: {n}\n" for n in ("mrpc", "cola"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    read = datasets.load_dataset

    def hub(path: str, *arguments: str | None, **options: Any) -> Any:
        return read(str(folder) if path == "some/tasks" else path, *arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    return "some/tasks"


def test_subset_of_a_hub_dataset_is_read(hub_of_subsets: str) -> None:
    assert load(hub_of_subsets, subset="mrpc").splits["train"]["text"][0] == "mrpc"


def test_missing_and_unknown_subsets_are_errors_that_name_them(hub_of_subsets: str) -> None:
    said = complaint(hub_of_subsets)
    assert 'data.path: "some/tasks" has several subsets, "mrpc", "cola"; choose one with' in said
    assert "data.subset: NAME" in said
    said = complaint(hub_of_subsets, subset="mrcp")
    assert 'data.subset: "some/tasks" has no "mrcp" (did you mean "mrpc"?); it has' in said


def test_subset_of_a_file_is_an_error(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", rows(6, "a", "b"))
    assert "only datasets of the Hub have subsets" in complaint(path, subset="mrpc")


def test_unreachable_hub_is_said_with_what_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(path: str, subset: str | None) -> datasets.DatasetDict:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    said = complaint("someone/some_data")
    assert 'there is no file or folder "someone/some_data"' in said
    assert "nor could it be had from the Hub: Couldn't reach" in said


def test_missing_path_names_the_nearest_and_leaves_the_hub_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(datasets, "load_dataset")
    pictures(tmp_path / "data" / "cats_vs_dogs", cat=2, dog=2)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "data" / "cats_v_dogs", "data/cats_v_dogs"):
        assert '(did you mean "cats_vs_dogs"?)' in complaint(path, IMAGES)
    assert 'no file or folder "nothing.csv"' in complaint("nothing.csv")
