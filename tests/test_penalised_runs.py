"""Every kind of penalty through a whole run: trained, killed, resumed."""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import hfft
from hfft.config_file import load_config
from hfft.errors import InputError
from hfft.hooks import PenaltyCallback
from hfft.penalties.penalty import kinds
from hfft.plan import make_plan
from hfft.source import load_weights

from .runs import largest_difference, log, losses, same_weights, write_config
from .test_run import kill

slow = pytest.mark.slow
OPTIONS: dict[str, dict[str, Any]] = {
    "fisher": {"examples": 6},
    "delta": {"attention": "none"},
    "orthogonal": {"interval": 2},
}


def penalty(kind: str, strength: float = 0.1) -> dict[str, Any]:
    return {"kind": kind, "strength": strength, **OPTIONS.get(kind, {})}


def stages(**second: Any) -> list[dict[str, Any]]:
    return [
        {"name": "head", "freeze": "backbone", "epochs": 1},
        {"name": "top", "freeze": 2, "epochs": 2, **second},
    ]


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        pytest.param(folder, kind, marks=() if folder == "vit_folder" and kind == "l2_sp" else slow)
        for folder in ("vit_folder", "timm_folder")
        for kind in kinds()
    ],
)
def test_every_kind_trains_and_a_resumed_run_equals_the_uninterrupted_one(
    folder: str,
    kind: str,
    tmp_path: Path,
    image_folder: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = write_config(
        tmp_path / "c.yaml",
        request.getfixturevalue(folder),
        image_folder,
        stages=stages(penalty=penalty(kind)),
        training={"save_strategy": "steps", "save_steps": 2},
    )
    hfft.train(config, [f"output_dir={tmp_path / 'whole'}"])
    steps = count(1)
    kill(config, monkeypatch, lambda _: next(steps) > 6)
    hfft.train(config, resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")
    logged = [e for e in log(tmp_path / "run") if e.get("stage") == "top" and "loss" in e]
    assert [e[kind] for e in logged]
    assert all(isinstance(e[f"{kind}_weighted"], float) for e in logged)
    plain = [f"output_dir={tmp_path / 'plain'}", "stages.1.penalty=null"]
    hfft.train(config, plain)
    assert not same_weights(tmp_path / "whole", tmp_path / "plain")


@slow
@pytest.mark.parametrize("hold", [{"mixout": 0.5}, {"stochnorm": 0.5}])
def test_mixout_and_stochnorm_resume_bit_for_bit(
    hold: dict[str, float],
    tmp_path: Path,
    timm_folder: Path,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = write_config(
        tmp_path / "c.yaml",
        timm_folder,
        image_folder,
        stages=stages(**hold),
        training={"save_strategy": "steps", "save_steps": 2},
    )
    hfft.train(config, [f"output_dir={tmp_path / 'whole'}"])
    steps = count(1)
    kill(config, monkeypatch, lambda _: next(steps) > 6)
    hfft.train(config, resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    hfft.train(config, [f"output_dir={tmp_path / 'plain'}", f"stages.1.{next(iter(hold))}=null"])
    assert not same_weights(tmp_path / "whole", tmp_path / "plain")


def test_l_and_each_r_are_logged_apart(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    both = [penalty("l2_sp", 0.5), {**penalty("cosine"), "schedule": "linear"}]
    config = write_config(
        tmp_path / "c.yaml", vit_folder, image_folder, stages=stages(penalty=both)
    )
    hfft.train(config)
    logged = [e for e in log(tmp_path / "run") if e.get("stage") == "top" and "loss" in e]
    assert all(e["l2_sp_weighted"] == pytest.approx(0.5 * e["l2_sp"]) for e in logged)
    assert logged[-1]["cosine"] > 0
    assert logged[-1]["cosine_weighted"] == 0  # at the end of a linear schedule
    first = next(e for e in log(tmp_path / "run") if e.get("stage") == "head" and "loss" in e)
    assert "l2_sp" not in first


def test_a_strong_penalty_holds_the_weights_at_the_source(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", vit_folder, image_folder, stages=stages())
    moved = []
    for strength in (0.0, 500.0):
        hold = json.dumps({"kind": "l2_sp", "strength": strength, "mode": "decoupled"})
        hfft.train(config, [f"stages.1.penalty={hold}"], overwrite=True)
        moved.append([e["l2_sp"] for e in log(tmp_path / "run") if "l2_sp" in e][-1])
    assert moved[1] < 0.7 * moved[0]


@pytest.mark.parametrize(
    "kind", ["l2_sp", *(pytest.param(kind, marks=slow) for kind in ("spd", "orthogonal", "delta"))]
)
def test_accumulated_batches_have_the_strength_of_whole_ones(
    kind: str, tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    vit = json.loads((vit_folder / "config.json").read_text())
    assert vit["hidden_dropout_prob"] > 0  # which is why it is switched off here
    still = tmp_path / "still"
    shutil.copytree(vit_folder, still)
    (still / "config.json").write_text(json.dumps(vit | {"hidden_dropout_prob": 0.0}))
    config = write_config(
        tmp_path / "c.yaml", still, image_folder, stages=stages(penalty=penalty(kind, 0.5))
    )
    for batch, times in ((6, 1), (3, 2), (1, 6)):
        batches = f"per_device_train_batch_size: {batch}, gradient_accumulation_steps: {times}"
        # Adam would make steps of the rounding of gradients that are zero
        training = f"training={{{batches}, optim: sgd, learning_rate: 0.1}}"
        hfft.train(config, [training, f"output_dir={tmp_path / str(times)}"])
    assert largest_difference(tmp_path / "1", tmp_path / "2") < 2e-5
    assert largest_difference(tmp_path / "1", tmp_path / "6") < 2e-5


def test_the_source_is_in_no_checkpoint(
    tmp_path: Path, vit_folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a checkpoint holds is as large with a penalty as without."""
    sizes = []
    for hold in ("{kind: l2_sp, strength: 0.1}", "null"):
        run = tmp_path / str(len(sizes))
        config = write_config(
            tmp_path / "c.yaml", vit_folder, image_folder, stages=stages(), output_dir=str(run)
        )
        text = config.read_text().replace("name: top", f"name: top\n  penalty: {hold}")
        config.write_text(text)
        steps = count(1)
        kill(config, monkeypatch, lambda _, steps=steps: next(steps) > 8)  # type: ignore[misc]
        [folder] = (run / "checkpoints" / "main" / "01-top").glob("checkpoint-3")
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = set(file.keys())
        size = (folder / "optimizer.pt").stat().st_size
        sizes.append((names, size))
    assert sizes[0][0] == sizes[1][0]
    assert abs(sizes[0][1] - sizes[1][1]) < 100


def test_theta_s_is_read_from_the_sources_file_and_not_copied(
    tmp_path: Path, vit_folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    made = PenaltyCallback.__init__

    def note(self: PenaltyCallback, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        given = kwargs["source"]
        assert all(self._source[n].data_ptr() == given[n].data_ptr() for n in self._source)
        seen.append(self._source)

    monkeypatch.setattr(PenaltyCallback, "__init__", note)
    config = write_config(
        tmp_path / "c.yaml", vit_folder, image_folder, stages=stages(penalty=penalty("l2_sp"))
    )
    hfft.train(config)
    plan = make_plan(load_config(config))
    again = load_weights(plan.task.auto_model, plan.config.model, plan.subject.model_config).model
    values = dict(again.named_parameters())
    assert seen[0]
    assert all(torch.equal(seen[0][name], values[name]) for name in seen[0])


def test_with_lora_the_penalty_is_on_the_product(
    tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    hold = [penalty("l2_sp", 0.5), penalty("cosine")]
    strategy = {"name": "lora", "epochs": 2, "r": 2, "penalty": hold}
    config = write_config(tmp_path / "c.yaml", vit_folder, image_folder, strategy=strategy)
    plan = make_plan(load_config(config))
    covered = plan.main.stages[0].penalties[0].coverage.to_source
    assert covered
    assert all(name.endswith(".base_layer.weight") for name in covered)
    hfft.train(config)
    logged = [e for e in log(tmp_path / "run") if "l2_sp" in e]
    assert logged[0]["l2_sp"] < logged[-1]["l2_sp"]
    for hold, said in (
        ({"penalty": penalty("spd")}, "strategy.penalty.kind: spd is a matter of single weights"),
        ({"penalty": penalty("fisher")}, "strategy.penalty.kind: fisher is a matter of"),
        ({"mixout": 0.5}, "strategy.mixout: the source has none of the weight matrices"),
    ):
        refused = {**strategy, "penalty": None, **hold}
        config = write_config(tmp_path / "d.yaml", vit_folder, image_folder, strategy=refused)
        with pytest.raises(InputError) as caught:
            make_plan(load_config(config))
        assert said in str(caught.value)
