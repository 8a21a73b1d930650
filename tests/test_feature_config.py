"""`feature_cache` in a config: its forms, its complaints, and what the plan says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfft.cli import main
from hfft.config_file import dump_config, json_schema, load_config
from hfft.errors import InputError

from .feature_runs import FLIPPED, config_of, stages

GRADUAL = {"name": "gradual", "epochs": 3}


def config_with(folder: Path, text: str) -> Path:
    """A config that says `feature_cache: TEXT`, as a user would."""
    path = folder / "c.yaml"
    path.write_text(
        "task: image-classification\nmodel: some/model\ndata: {path: images}\n"
        f"feature_cache: {text}\n"
    )
    return path


def read(folder: Path, text: str, *overrides: str) -> dict[str, Any]:
    config = load_config(config_with(folder, text), list(overrides))
    return config.feature_cache.model_dump(exclude_defaults=True)


SAME: list[tuple[str, dict[str, Any]]] = [
    ("auto", {}),
    ("{}", {}),
    ("on", {"mode": "on"}),
    ("off", {"mode": "off"}),
    ("true", {"mode": "on"}),
    ("False", {"mode": "off"}),
    ("'on'", {"mode": "on"}),
    ("20GB", {"limit": 20 * 10**9}),
    ("1.5 TB", {"limit": 1500 * 10**9}),
    ("500mb", {"limit": 500 * 10**6}),
    ("7 kB", {"limit": 7000}),
    ("12B", {"limit": 12}),
    ("3g", {"limit": 3 * 10**9}),
    ("5000000", {"limit": 5_000_000}),
    ("{limit: 1.5TB}", {"limit": 1500 * 10**9}),
    ("{mode: auto, views: 3, dtype: bfloat16}", {"views": 3, "dtype": "bfloat16"}),
    ("{mode: on}", {"mode": "on"}),
    ("{mode: off, views: 2}", {"mode": "off", "views": 2}),
    ("{mode: 'on', limit: 20GB}", {"mode": "on", "limit": 20 * 10**9}),
]


@pytest.mark.parametrize(("text", "meant"), SAME)
def test_every_form_is_read_and_written_back_as_the_same(
    text: str, meant: dict[str, Any], tmp_path: Path
) -> None:
    assert read(tmp_path, text) == meant
    config = load_config(tmp_path / "c.yaml")
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


SIZE = "expected a size such as 500MB or 20GB"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("20XB", f"feature_cache.limit: {SIZE}, found '20XB'"),
        ("20 GB a run", f"feature_cache.limit: {SIZE}, found '20 GB a run'"),
        ("''", f"feature_cache.limit: {SIZE}, found ''"),
        ("{limit: lots}", "feature_cache.limit: expected .*found 'lots'"),
        ("0", "feature_cache.limit: .*greater than 0, found 0"),
        ("-1", "feature_cache.limit: .*greater than 0, found -1"),
        ("0GB", "feature_cache.limit: .*greater than 0, found 0"),
        ("2.5", "feature_cache.limit: .*found 2.5"),
        ("[on]", r"feature_cache: .*found \[True\]"),
        ("{limit: true}", "feature_cache.limit: .*found True"),
        ("{views: 0}", "feature_cache.views: .*greater than 0, found 0"),
        ("{views: 1.5}", "feature_cache.views: .*integer, found 1.5"),
        ("{views: true}", "feature_cache.views: .*integer, found True"),
        ("{view: 2}", "feature_cache.view: unknown key; did you mean 'views'"),
        ("{mode: always}", "feature_cache.mode: 'always' is none of its values"),
        ("{dtype: fp16}", "feature_cache.dtype: 'fp16' is none of its values"),
    ],
)
def test_what_is_none_of_the_forms_is_an_error_that_names_its_place(
    text: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        read(tmp_path, text)


def test_every_error_of_the_section_is_told_at_once_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_with(tmp_path, "{views: 0, limit: 20XB, dtype: fp16, bogus: 1}")
    for verb in ("plan", "train"):
        assert main([verb, str(path)]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 4
        for name, line in zip(("views", "dtype", "limit", "bogus"), said, strict=True):
            assert line.startswith(f"hfft: {path}: feature_cache.{name}: ")


@pytest.mark.parametrize(
    ("text", "override", "meant"),
    [
        ("auto", "feature_cache=off", {"mode": "off"}),
        ("{views: 2}", "feature_cache=on", {"mode": "on"}),
        ("{views: 2}", "feature_cache=3GB", {"limit": 3 * 10**9}),
        ("{mode: 'on'}", "feature_cache.views=2", {"mode": "on", "views": 2}),
        ("{mode: 'on'}", "feature_cache.limit=3GB", {"mode": "on", "limit": 3 * 10**9}),
        ("{views: 2}", "feature_cache.mode=off", {"mode": "off", "views": 2}),
        ("on", "feature_cache.views=2", {"mode": "on", "views": 2}),
        ("20GB", "feature_cache.views=2", {"limit": 20 * 10**9, "views": 2}),
        ("5000000", "feature_cache.mode=on", {"limit": 5_000_000, "mode": "on"}),
    ],
)
def test_overrides_replace_the_section_or_one_field(
    text: str, override: str, meant: dict[str, Any], tmp_path: Path
) -> None:
    assert read(tmp_path, text, override) == meant


@pytest.mark.parametrize("override", ["feature_cache.views=2", "feature_cache.mode=on"])
def test_an_override_makes_the_section_where_there_is_none(override: str, tmp_path: Path) -> None:
    path = config_with(tmp_path, "auto")
    path.write_text(path.read_text().replace("feature_cache: auto\n", ""))
    key, _, value = override.partition(".")[2].partition("=")
    found = load_config(path, [override]).feature_cache.model_dump(exclude_defaults=True)
    assert {name: str(one) for name, one in found.items()} == {key: value}


def accepts(schema: Any, value: object, definitions: dict[str, Any]) -> bool:
    """Whether a JSON Schema (of types, enums and sections) accepts a value."""
    if "$ref" in schema:
        return accepts(definitions[schema["$ref"].rpartition("/")[2]], value, definitions)
    if "anyOf" in schema:
        return any(accepts(one, value, definitions) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    kinds = {"string": str, "boolean": bool, "null": type(None), "object": dict}
    kinds |= {"number": (int, float)}
    if not any(
        type(value) is int if name == "integer" else isinstance(value, kinds[name])
        for name in names
    ):
        return False
    if isinstance(value, dict):
        parts = schema["properties"]
        return all(k in parts and accepts(parts[k], one, definitions) for k, one in value.items())
    return not (type(value) is int and value <= schema.get("exclusiveMinimum", value - 1))


def test_the_json_schema_accepts_the_forms_and_no_others() -> None:
    schema = json_schema()
    form, definitions = schema["properties"]["feature_cache"], schema["$defs"]
    right = ["auto", "on", "off", True, False, "20GB", "1.5 TB", 5_000_000, {}]
    right += [{"mode": "on"}, {"mode": "off", "views": 2}, {"views": 2, "dtype": "float16"}]
    right += [{"limit": 10**9}, {"limit": "20GB"}, {"views": None, "limit": None}]
    for value in right:
        assert accepts(form, value, definitions), value
    for value in (["on"], {"views": 0}, {"views": "2"}, {"view": 2}, {"dtype": "fp16"}):
        assert not accepts(form, value, definitions), value


# The plan


def lines_of_plan(capsys: pytest.CaptureFixture[str], config: Path) -> list[str]:
    """What `hfft plan` says of the frozen layers."""
    assert main(["plan", str(config)]) == 0
    text = capsys.readouterr().out.partition("Frozen layers:\n")[2].partition("\n\n")[0]
    return [line.strip() for line in text.splitlines()]


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ("on", ["stored before classifier", "stored before vit.layers.2", "stored before vit."]),
        ("off", ["computed in every epoch: feature_cache is off"] * 3),
        ({"mode": "on", "limit": "4KB"}, ["stored before", "do not fit into", "do not fit into"]),
    ],
)
def test_plan_has_a_line_for_each_stage_that_keeps_something_frozen(
    cache: Any,
    said: list[str],
    tmp_path: Path,
    vit_folder: Path,
    image_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sections = {"strategy": GRADUAL, "baselines": ["frozen", "scratch"]}
    path = config_of(tmp_path / "run", vit_folder, image_folder, cache, **sections)
    lines = lines_of_plan(capsys, path)
    names = ["main, head", "main, top-1", "main, top-2", "frozen, frozen"]
    assert [line.partition(": ")[0] for line in lines] == names
    for words, line in zip(said, lines, strict=False):
        assert words in line
    assert said[0] in lines[-1]


def test_plan_says_why_a_stage_is_computed_and_what_to_set(
    tmp_path: Path,
    vit_folder: Path,
    image_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    delta = {"kind": "delta", "strength": 0.1, "attention": "none"}
    path = config_of(tmp_path / "run", vit_folder, image_folder, "on", stages=stages(penalty=delta))
    assert "the penalty delta needs the model's inputs" in lines_of_plan(capsys, path)[1]
    path = config_of(
        tmp_path / "other", vit_folder, image_folder, "on", task=FLIPPED, strategy="full"
    )
    assert lines_of_plan(capsys, path) == ["none"]
    frozen = {"name": "frozen", "epochs": 8}
    path = config_of(
        tmp_path / "third", vit_folder, image_folder, "on", task=FLIPPED, strategy=frozen
    )
    assert main(["plan", str(path)]) == 0
    assert "feature_cache.views=4 makes that 4 passes instead of 8" in capsys.readouterr().out
