"""Arguments that a Trainer would break on are found by making a plan."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from transformers import TrainingArguments

from hfft import arguments
from hfft.config_file import load_config
from hfft.errors import InputError
from hfft.plan import make_plan
from tests.runs import write_config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["load_best_model_at_end=true", "eval_strategy='no'"], "save and eval strategy to match"),
        (["logging_steps=0"], "non-zero --logging_steps"),
        (["save_strategy=best"], "metric_for_best_model"),
        (["report_to=[nothing]"], "nothing is not supported"),
        (["adam_beta1=5"], "Invalid beta parameter"),
        (["lr_scheduler_kwargs={num_cycles: 1}"], "num_cycles"),
        (["accelerator_config={nothing: 1}"], "nothing"),
        (["dataloader_persistent_workers=true"], "num_workers > 0"),
        (["fsdp=full_shard"], "fsdp only works in distributed training"),
    ],
)
def test_arguments_that_do_not_go_together_are_found_by_the_plan(
    overrides: list[str], message: str, tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    path = write_config(tmp_path / "c.yaml", vit_folder, image_folder)
    assignments = [f"training.{override}" for override in overrides]
    config = load_config(path, assignments)
    with pytest.raises(InputError, match=message) as caught:
        make_plan(config)
    assert all(said.startswith("training: ") for said in caught.value.messages)
    assert not (tmp_path / "run").exists()


def test_options_that_only_the_transform_checks_are_found_by_the_plan(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    task = {"name": "image-classification", "augmentation": {"auto_augment": "nothing"}}
    path = write_config(tmp_path / "c.yaml", vit_folder, image_folder, task=task)
    config = load_config(path)
    with pytest.raises(InputError, match="timm knows no 'nothing'"):
        make_plan(config)


def loading(
    folder: Path, model: Path, images: Path, overrides: dict[str, object]
) -> TrainingArguments:
    path = write_config(folder / "c.yaml", model, images)
    config = load_config(path, [f"training.{key}={value}" for key, value in overrides.items()])
    planned = make_plan(config).main.stages[0]
    return arguments.training_arguments(config, planned, folder / "run", 0)


def with_accelerator(monkeypatch: pytest.MonkeyPatch, processors: int, processes: int) -> None:
    """As if there were one; the arguments' own device stays the CPU."""
    monkeypatch.setattr(arguments, "has_accelerator", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))


@pytest.mark.parametrize(
    ("processors", "processes", "workers"),
    [(16, 1, 8), (8, 1, 7), (16, 4, 3), (2, 2, 0), (1, 1, 0)],
)
def test_an_accelerator_is_fed_by_its_share_of_the_processors(
    processors: int, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_accelerator(monkeypatch, processors, processes)
    assert arguments._workers() == workers


def test_workers_persist_where_there_are_any(
    tmp_path: Path, vit_folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_accelerator(monkeypatch, 4, 1)
    for overrides, expected in (
        ({}, (3, True)),
        ({"dataloader_num_workers": 0}, (0, False)),
        ({"dataloader_num_workers": 2}, (2, True)),
        ({"dataloader_num_workers": 2, "dataloader_persistent_workers": "false"}, (2, False)),
    ):
        made = loading(tmp_path, vit_folder, image_folder, overrides)
        assert (made.dataloader_num_workers, made.dataloader_persistent_workers) == expected


def test_on_processors_alone_examples_are_made_by_the_training_process(
    tmp_path: Path, vit_folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "has_accelerator", lambda: False)
    for overrides, expected in (({}, (0, False)), ({"dataloader_num_workers": 2}, (2, False))):
        made = loading(tmp_path, vit_folder, image_folder, overrides)
        assert (made.dataloader_num_workers, made.dataloader_persistent_workers) == expected


def test_a_transform_is_handed_to_forks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with_accelerator(monkeypatch, 4, 1)
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing, "get_context", lambda: context)
    assert arguments._workers() == 0
