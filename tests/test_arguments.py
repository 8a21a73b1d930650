"""Arguments that a Trainer would break on are found by making a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

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
