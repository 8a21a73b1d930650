"""Training on stored examples is training on whole ones: the same losses, the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hfft.features.room import list_entries

from .training import difference, new_model, run

ROOT = Path(__file__).parents[2]
# Relative; all differences are of float32's rounding (2^-24 is 6e-8), where batches of the one pass
# are of other sizes, and padded otherwise, than those of the training.
TOLERANCE = 1e-6
SLOW = pytest.mark.slow
CASES: list[tuple[str, Any]] = [
    ("timm-resnet", 3),
    ("timm-resnet", 5),
    ("convnext", 2),
    ("vit", 2),
    ("vit", 4),
    ("bert", 2),
    ("bert", 4),
    ("modernbert", 2),
    ("deberta", 2),
    ("gpt2-classes", 2),
    ("gpt2-classes", 4),
    ("clip", (1, 3)),
    ("clip", (0, 3)),
    ("clip", (4, 0)),
    ("clip", (2, 2)),
]


FAST = [("timm-resnet", 3), ("bert", 2), ("clip", (1, 3))]


@pytest.mark.parametrize(
    ("family", "boundary"),
    [
        pytest.param(*case, id=f"{case[0]} {case[1]}", marks=[] if case in FAST else [SLOW])
        for case in CASES
    ],
)
def test_stored_training_equals_whole_training(family: str, boundary: Any, tmp_path: Path) -> None:
    whole, one, _ = run(family, boundary, tmp_path / "whole", stored=False)
    stored, other, _ = run(family, boundary, tmp_path / "stored", stored=True)
    assert len(whole) == 6
    assert stored == pytest.approx(whole, rel=TOLERANCE)
    assert difference(one, other) < TOLERANCE
    start = new_model(family, boundary)
    for name, parameter in start.named_parameters():
        assert parameter.requires_grad or torch.equal(other[name], parameter), name
    moved = [
        n for n, p in start.named_parameters() if p.requires_grad and not torch.equal(p, other[n])
    ]
    assert len(moved) > 0.8 * sum(p.requires_grad for p in start.parameters())
    below = {name for name, p in start.named_parameters() if not p.requires_grad}
    for name, value in start.named_buffers():  # statistics of frozen BatchNorm
        if f"{name.rpartition('.')[0]}.weight" in below:
            assert torch.equal(other[name], value), name


def test_the_second_run_reads_what_the_first_stored(tmp_path: Path) -> None:
    first, _, one = run("bert", 2, tmp_path, stored=True)
    [entry] = list_entries(Path(os.environ["HFFT_CACHE"]))
    time = {path: path.stat().st_mtime_ns for path in entry.folder.glob("chunk*")}
    second, _, other = run("bert", 2, tmp_path, stored=True)
    assert {path: path.stat().st_mtime_ns for path in entry.folder.glob("chunk*")} == time
    assert second == first
    assert other == one


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each process found, by how many there were."""
    found: dict[int, list[dict[str, Any]]] = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"world{world}")
        command = [sys.executable]
        if world > 1:
            command += ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
            command += ["--config_file", str(ROOT / "configs" / "accelerate" / "two_cpu.yaml")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "HFFT_CACHE": str(folder / "cache"),
        }
        done = subprocess.run(
            [*command, str(Path(__file__).with_name("two_launch.py")), str(folder)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[world] = [
            json.loads((folder / f"rank{n}.json").read_text()) | {"folder": str(folder)}
            for n in range(world)
        ]
    return found


Launched = dict[int, list[dict[str, Any]]]


@SLOW
@pytest.mark.parametrize("case", ["bert 2", "timm-resnet 3", "timm-resnet 5", "clip (1, 3)"])
def test_two_processes_train_on_stored_examples_as_on_whole_ones(
    case: str, launched: Launched
) -> None:
    ranks = [rank[case] for rank in launched[2]]
    assert ranks[0]["digest"] == ranks[1]["digest"]  # replicas are bit-identical
    for rank in ranks:
        assert len(rank["whole"]) == 6
        assert rank["stored"] == pytest.approx(rank["whole"], rel=TOLERANCE)
        assert rank["difference"] < TOLERANCE


@SLOW
@pytest.mark.parametrize("case", ["bert 2", "timm-resnet 5"])
def test_two_processes_on_stored_examples_equal_one_on_whole_ones(
    case: str, launched: Launched
) -> None:
    """No BatchNorm learns, and no loss is across the batch: these differ by the batch's size."""
    [one], [two, _] = launched[1], launched[2]
    assert two[case]["stored"] == pytest.approx(one[case]["whole"], rel=TOLERANCE)
    family = case.split()[0]
    first, second = (
        torch.load(Path(rank["folder"]) / f"{family}-{world}-0.pt")
        for world, rank in ((1, one), (2, two))
    )
    assert difference(first, second) < TOLERANCE


@SLOW
def test_two_processes_share_the_pass(launched: Launched) -> None:
    one, other = (rank["shared"] for rank in launched[2])
    assert one["stored"]
    assert other["stored"]
    assert one["missing"] == other["missing"] == [[]]
    assert one["written"] == [0, 2, 4]
    assert other["written"] == [1, 3, 5]


@SLOW
@pytest.mark.parametrize("where", ["open", "write"])
def test_all_processes_go_on_without_features_where_one_meets_a_full_disk(
    where: str, launched: Launched
) -> None:
    for rank in launched[2]:
        found = rank[f"failing at {where}"]
        assert not found["stored"]
        assert found["collate"]  # the task's own
        assert found["missing"] == []


@SLOW
def test_processes_of_other_weights_do_not_share(launched: Launched) -> None:
    assert [rank["differing"]["stored"] for rank in launched[2]] == [False, False]
