"""Sections of the YAML file that stand for themselves: task, model, data, penalties, cache, Hub."""

from __future__ import annotations

import math
import os
import re
from decimal import Decimal
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)


class Section(BaseModel):
    """A part of the config: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# `~` is the home folder in a shell only; in a file it would make a folder of that name.
LocalPath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


def by_name(value: object) -> object:
    """Let `strategy: gradual` stand for `strategy: {name: gradual}`."""
    return {"name": value} if isinstance(value, str) else value


TowerKind = Literal["image", "audio", "text"]
"""What a tower reads."""


class TaskConfig(BaseModel):
    """What is learned. Keys other than the name are the task's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="a registered task; `hfft tasks` lists them")


class Pretrained(Section):
    """Pretrained weights, and what they are allowed to do."""

    name: LocalPath = Field(description="Hub id (`timm/NAME` for timm) or local folder")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    allow_pickle: bool = Field(
        False, description="load pickled weights, which can run code; default: safetensors only"
    )
    attn_implementation: str | None = Field(
        None,
        description="sdpa, flash_attention_2, eager …; default: the fastest that is always there",
    )


class TowerConfig(Pretrained):
    """One of two towers: a pretrained model, and how what it returns becomes one vector."""

    pooling: Literal["auto", "pooler", "cls", "mean", "max", "last"] = Field(
        "auto",
        description="pooler: the model's own pooled output; else of its hidden states the first, "
        "the mean …; auto: as it was pretrained, as far as its files say so",
    )


class TowersConfig(Section):
    """Two pretrained models that have not met: one of texts, one of images or of audio."""

    image: Annotated[TowerConfig | None, BeforeValidator(by_name)] = Field(
        None, description="of any timm model, or image model of transformers"
    )
    audio: Annotated[TowerConfig | None, BeforeValidator(by_name)] = Field(
        None, description="such as wav2vec2, HuBERT, AST, Whisper"
    )
    text: Annotated[TowerConfig, BeforeValidator(by_name)] = Field(
        description="any encoder or decoder of texts"
    )

    @model_validator(mode="after")
    def _one_beside_the_text(self) -> TowersConfig:
        if (self.image is None) == (self.audio is None):
            raise ValueError("give image or audio beside text, one of them")
        return self

    @property
    def by_kind(self) -> dict[TowerKind, TowerConfig]:
        """The two of them, by what they read; that of texts is the second."""
        other = {"image": self.image, "audio": self.audio, "text": self.text}
        return {cast(TowerKind, kind): tower for kind, tower in other.items() if tower is not None}


class ModelConfig(Pretrained):
    """The source model, theta_s: a pretrained one, or two towers."""

    name: LocalPath = Field(
        "", validate_default=False, description=Pretrained.model_fields["name"].description
    )
    trust_remote_code: bool = Field(False, description="run the model repository's own Python code")
    towers: TowersConfig | None = Field(
        None, description="instead of name: {image: NAME, text: NAME}, or audio in the place of it"
    )
    projection: int | None = Field(
        None, gt=0, description="of towers: the length of what both map to; default: 256"
    )
    _place: str = PrivateAttr("model")

    @model_validator(mode="after")
    def _name_or_towers(self) -> ModelConfig:
        if self.towers is None:
            if not self.name:
                raise ValueError("give the name of a model, or two towers")
            if self.projection is not None:
                raise ValueError("projection goes with towers; a model has its own")
            return self
        if self.trust_remote_code:
            raise ValueError(
                "trust_remote_code doesn't go with towers, which can't take code along; take "
                "models that transformers has"
            )
        if given := sorted(self.model_fields_set & set(Pretrained.model_fields) - {"name"}):
            raise ValueError(f"{given[0]} doesn't go with towers; give it to one of them")
        both = " + ".join(tower.name for tower in self.towers.by_kind.values())
        if self.name not in ("", both):
            raise ValueError("name and towers both say what the model is; keep one of them")
        object.__setattr__(self, "name", both)  # for reports; the section is frozen
        return self

    @property
    def place(self) -> str:
        """The key in the config that messages name."""
        return self._place

    @property
    def names(self) -> list[str]:
        """What is loaded: the model, or both towers."""
        towers = self.towers.by_kind.values() if self.towers is not None else ()
        return [tower.name for tower in towers] or [self.name]

    def tower(self, kind: TowerKind) -> ModelConfig:
        """Return what one tower is loaded from; of a model that is whole, that model."""
        if self.towers is None:
            return self
        found = self.towers.by_kind[kind].model_dump(exclude={"pooling"})
        source = ModelConfig.model_validate(found)
        source._place = f"model.towers.{kind}"
        return source


class DataConfig(Section):
    """Where the examples are and which of them serve for what."""

    path: str = Field(
        description="Hub id (downloaded whole, since every example is checked before training), "
        "folder of images or sounds by class, CSV, JSON Lines, Parquet, tar shards (WebDataset; "
        "`train-{0000..0099}.tar`), plain text (an example a line) or saved dataset"
    )
    subset: str | None = Field(
        None, description="configuration of a Hub dataset, such as mrpc of nyu-mll/glue"
    )
    train: str = Field("train", description="split, slice (`train[:90%]`), file or folder")
    validation: str | None = Field(
        None,
        description="as train; left out: a seeded tenth of train, by class, is held out",
    )
    test: str | None = Field(None, description="as train; scored once, at the end")
    columns: dict[str, str] = Field(
        default_factory=dict, description="role to column, where the names differ from the task's"
    )
    on_bad_example: Literal["error", "skip"] = Field(
        "error",
        description="what an undecodable or incomplete example does: stop the run, or be left out",
    )

    @model_validator(mode="before")
    @classmethod
    def _fetched_whole(cls, given: Any) -> Any:
        if isinstance(given, dict) and "streaming" in given:
            raise ValueError(
                "there is no streaming: every example is checked before training, so that all are "
                "fetched, once, and cached; remove it, or train on a slice, train: train[:10%]"
            )
        return given


class RetentionConfig(Section):
    """What the source can do, and may forget: a second task, scored before and after."""

    task: Annotated[TaskConfig, BeforeValidator(by_name)] = Field(
        description="one that the source has a head for, such as fill-mask, or the run's own"
    )
    data: DataConfig = Field(
        description="of which one split is scored: validation, or test; left out: the place's own "
        "validation, else test, else its only split"
    )

    @model_validator(mode="after")
    def _one_split(self) -> RetentionConfig:
        if "train" in self.data.model_fields_set:
            raise ValueError("data.train: nothing is trained on it; name its split as validation")
        if self.data.validation is not None and self.data.test is not None:
            raise ValueError("data.validation and data.test: one split is scored; keep one of them")
        return self


class WiseFtAverage(Section):
    """Weights between the source's and the fine-tuned ones (WiSE-FT, Wortsman et al. 2022)."""

    kind: Literal["wise_ft"]
    alphas: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(strict=False, min_length=1)
    ] = Field(
        tuple(tenth / 10 for tenth in range(11)),
        description="from 0, the source, to 1, the fine-tuned weights; the best on validation "
        "counts",
    )

    @model_validator(mode="after")
    def _each_once(self) -> WiseFtAverage:
        if len(set(self.alphas)) < len(self.alphas):
            raise ValueError("alphas: one of them stands twice")
        return self


def _members(value: object) -> object:
    """Check what a soup is of as one thing: as a union, each of its forms would complain."""
    folders = value if isinstance(value, list | tuple) else []
    if value != "checkpoints" and not (folders and all(isinstance(f, str) and f for f in folders)):
        raise ValueError(f"expected checkpoints, or a list of run folders, found {value!r}")
    if len(set(folders)) < len(folders):
        raise ValueError("a run folder stands twice")
    return value if value == "checkpoints" else tuple(folders)


class SoupAverage(Section):
    """The mean of several models' weights (model soups, Wortsman et al. 2022)."""

    kind: Literal["uniform_soup", "greedy_soup"] = Field(
        description="uniform: of all; greedy: the best on validation, and of the others, from the "
        "better to the worse, those that don't make it worse"
    )
    of: Annotated[
        Literal["checkpoints"] | tuple[LocalPath, ...],
        BeforeValidator(_members),
    ] = Field(
        "checkpoints",
        description="checkpoints: those that the last stage keeps (training.save_total_limit); or "
        "finished runs of the same architecture from the same source, to which this run is added",
    )


class EmaAverage(Section):
    """The exponential moving average of the weights over the steps of the last stage."""

    kind: Literal["ema"]
    decay: float = Field(
        0.999, gt=0, lt=1, description="what a step leaves of the average; 0.999: of 1000 steps"
    )
    warmup: bool = Field(
        True,
        description="a lower decay in the first steps, 1 - step^(-2/3), which forgets the weights "
        "that the stage starts with",
    )


AverageConfig = Annotated[WiseFtAverage | SoupAverage | EmaAverage, Field(discriminator="kind")]


def _strength(value: object) -> object:
    """Check a strength as one thing: as a union, each of its forms would complain."""
    numbers = list(value.values()) if isinstance(value, dict) else [value]
    right = [
        isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < math.inf
        for n in numbers
    ]
    if not numbers or not all(right):
        raise ValueError(
            f"expected a number, 0 or more, or name patterns to such numbers, found {value!r}"
        )
    return value


class PenaltyConfig(BaseModel):
    """What pulls the weights to the source. Other keys are the penalty's own options."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)
    kind: str = Field(description="a registered penalty; hfft schema lists them")
    strength: Annotated[float | dict[str, float], BeforeValidator(_strength)] = Field(
        description="lambda; or name pattern to lambda, the first that matches a tensor counting"
    )
    mode: Literal["coupled", "decoupled"] = Field(
        "coupled",
        description="coupled: a term of the objective; decoupled: as AdamW treats weight decay",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="the strength over the stage, from strength to end_factor times it"
    )
    end_factor: float = Field(0, ge=0, description="the last step's strength over the first's")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the copy of the source's weights; default: as the weights"
    )
    source: Literal["original", "adapted"] = Field(
        "original",
        description="theta_s: the source's weights, or as the stages of another task left them",
    )

    @model_validator(mode="after")
    def _end_of_what(self) -> PenaltyConfig:
        if self.schedule == "constant" and self.end_factor:
            raise ValueError("end_factor goes with schedule: linear or cosine")
        return self


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _bytes(value: object) -> object:
    """Read `20GB`, or 2e10, as a number of bytes."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", value.upper())
    if found is None:
        raise ValueError(f"expected a size such as 500MB or 20GB, found {value!r}")
    return int(Decimal(found[1]) * _UNITS[found[2]])


def _mode(value: object) -> object:
    """Read what YAML makes of `on` and `off`."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class FeatureCacheConfig(Section):
    """How the output of frozen layers is kept, so that each example passes them once."""

    mode: Annotated[Literal["auto", "on", "off"], BeforeValidator(_mode)] = Field(
        "auto",
        description="auto: where it pays; on: wherever it is right; off: compute it in every epoch",
    )
    views: int | None = Field(
        None,
        gt=0,
        description="augment each training example in this many ways, drawn from in each epoch",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of what is stored; default: as computed"
    )
    limit: Annotated[
        int | None,
        BeforeValidator(_bytes),
        WithJsonSchema({"type": ["integer", "number", "string", "null"]}),
    ] = Field(
        None,
        gt=0,
        description="of the cache folder, such as 20GB; default: half the free disk",
    )


def _repo_id(value: str) -> str:
    from huggingface_hub.utils._validators import validate_repo_id

    validate_repo_id(value)  # raises a ValueError
    return value


class HubConfig(Section):
    """Where the finished model is pushed."""

    repo_id: Annotated[str, AfterValidator(_repo_id)] = Field(
        pattern=r"^[\w.-]+(/[\w.-]+)?$", description="user/name"
    )
    private: bool = Field(True, description="create the repository private")
    code: bool = Field(
        False, description="push the Python code that a model without a class of transformers needs"
    )
