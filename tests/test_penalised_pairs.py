"""Every kind of penalty on models of two towers, which contrast pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import hfft
from hfft.config_file import load_config
from hfft.errors import InputError
from hfft.penalties.penalty import get, kinds
from hfft.plan import make_plan
from tests import pair_models
from tests.runs import log, weights
from tests.test_penalised_runs import penalty

MODELS = ("clip", "towers")
FEW_STEPS = {"max_steps": 4, "logging_steps": 1, "eval_strategy": "no", "use_cpu": True}
FITTING = [kind for kind in kinds() if not get(kind).one_by_one]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    pair_models.save(pair_models.clip(), folder / "clip")
    pair_models.save(hf.ViTModel(hf.ViTConfig(**pair_models.VISION)), folder / "vit")
    pair_models.save(hf.BertModel(hf.BertConfig(**pair_models.TEXT)), folder / "bert")
    pair_models.write_pairs(folder / "pairs")
    return folder


def config_of(folder: Path, place: Path, model: str, **stage: Any) -> Path:
    towers = {"image": str(place / "vit"), "text": str(place / "bert")}
    source: Any = {"towers": towers, "projection": 16} if model == "towers" else place / model
    folder.mkdir(parents=True, exist_ok=True)
    main = {"name": "main", **stage}
    if "contrastive" not in stage:
        main["contrastive"] = {"global_batch": 6}
    return pair_models.write_config(
        folder / "c.yaml", source, place / "pairs", stages=[main], training=FEW_STEPS
    )


def plain(place: Path, model: str) -> Path:
    """Return a run without a penalty, which one test makes for all."""
    folder = place / "plain" / model
    if not (folder / "run" / "metrics.json").exists():
        hfft.train(config_of(folder, place, model))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", FITTING)
def test_every_kind_on_weights_or_activations_acts_on_both_towers(
    kind: str, model: str, tmp_path: Path, place: Path
) -> None:
    hfft.train(config_of(tmp_path, place, model, penalty=penalty(kind, 1.0)))
    *_, last = [entry for entry in log(tmp_path / "run") if "loss" in entry]
    assert last[kind] > 0
    held, free = weights(tmp_path / "run"), weights(plain(place, model))
    moved = {name.partition(".")[0] for name in held if not torch.equal(held[name], free[name])}
    assert {"vision_model", "text_model"} <= moved


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", FITTING)
def test_every_kind_on_weights_or_activations_is_planned_for_both_towers(
    kind: str, model: str, tmp_path: Path, place: Path
) -> None:
    plan = make_plan(load_config(config_of(tmp_path, place, model, penalty=penalty(kind))))
    [planned] = plan.main.stages[0].penalties
    towers = {name.partition(".")[0] for name in planned.coverage.to_source}
    assert {"vision_model", "text_model"} <= towers


def test_what_measures_single_examples_is_refused_before_training(
    tmp_path: Path, place: Path
) -> None:
    assert set(kinds()) - set(FITTING) == {"fisher"}
    config = config_of(tmp_path, place, "clip", penalty=penalty("fisher"))
    with pytest.raises(InputError, match=r"stages.0.penalty.kind: fisher measures .* one example"):
        make_plan(load_config(config))


@pytest.mark.parametrize("kind", ["bss", "delta"])
def test_what_acts_on_activations_is_refused_in_chunks(
    kind: str, tmp_path: Path, place: Path
) -> None:
    def plan(chunk: int, kind: str) -> None:
        contrastive = {"global_batch": 6, "chunk": chunk}
        config = config_of(tmp_path, place, "clip", penalty=penalty(kind), contrastive=contrastive)
        make_plan(load_config(config))

    with pytest.raises(InputError, match=rf"stages.0.contrastive.chunk: the penalty {kind} acts"):
        plan(3, kind)
    plan(6, kind)  # all in one piece
    plan(3, "l2_sp")
