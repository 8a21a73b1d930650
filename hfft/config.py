"""The schema of the YAML file: what may be written, and in which units."""

from __future__ import annotations

import math
import os
import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from hfft.yaml_file import whole_section


class Section(BaseModel):
    """A part of the config: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# `~` is the home folder in a shell only; in a file it would make a folder of that name.
LocalPath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


def _named(value: object) -> object:
    """Let `strategy: gradual` stand for `strategy: {name: gradual}`."""
    return {"name": value} if isinstance(value, str) else value


class TaskConfig(BaseModel):
    """What is learned. Keys other than the name are the task's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="a registered task; `hfft tasks` lists them")


class ModelConfig(Section):
    """The source model, theta_s."""

    name: LocalPath = Field(description="Hub id (`timm/NAME` for timm) or local folder")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    allow_pickle: bool = Field(
        False, description="load pickled weights, which can run code; default: safetensors only"
    )
    trust_remote_code: bool = Field(False, description="run the model repository's own Python code")


class DataConfig(Section):
    """Where the examples are and which of them serve for what."""

    path: str = Field(
        description="Hub id, folder of images by class, CSV, JSON Lines, Parquet or saved dataset"
    )
    train: str = Field("train", description="split, slice (`train[:90%]`), file or folder")
    validation: str | None = Field(
        None, description="as train; left out: a seeded, stratified tenth of train is held out"
    )
    test: str | None = Field(None, description="as train; scored once, at the end")
    columns: dict[str, str] = Field(
        default_factory=dict, description="role to column, where the names differ from the task's"
    )
    on_bad_example: Literal["error", "skip"] = Field(
        "error", description="what an undecodable example does: stop the run, or be left out"
    )


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

    @model_validator(mode="after")
    def _end_of_what(self) -> PenaltyConfig:
        if self.schedule == "constant" and self.end_factor:
            raise ValueError("end_factor goes with schedule: linear or cosine")
        return self


class Recipe(Section):
    """How long and how fast to learn. What is left out comes from `training`."""

    epochs: float | None = Field(None, gt=0, description="passes over train; fractions allowed")
    steps: int | None = Field(None, gt=0, description="optimizer steps, instead of epochs")
    learning_rate: float | None = Field(None, ge=0, description="peak rate of the topmost group")
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="each group's rate is this times that of the one above it"
    )
    head_multiplier: float | None = Field(
        None, gt=0, description="the head's rate over the body's; the body keeps learning_rate"
    )
    weight_decay: float | None = Field(None, ge=0, description="as training.weight_decay")
    lr_scheduler_type: str | None = Field(None, description="as training.lr_scheduler_type")
    warmup_steps: float | None = Field(
        None, ge=0, description="as training.warmup_steps: steps, or below 1 a share of the stage"
    )
    carry_optimizer_state: bool = Field(
        True, description="start from the optimizer state of the stage before, where there is one"
    )

    @model_validator(mode="after")
    def _one_length(self) -> Recipe:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps both set the length; keep one of them")
        return self


def _listed(value: object) -> object:
    """Let one penalty stand for a list of one."""
    if isinstance(value, str):
        raise ValueError(f"a penalty needs a strength: {{kind: {value}, strength: ...}}")
    return (value,) if isinstance(value, dict | PenaltyConfig) else value


class StageFields(Recipe):
    """A recipe, and what holds the weights to the source."""

    penalty: Annotated[
        tuple[PenaltyConfig, ...] | None, Field(strict=False), BeforeValidator(_listed)
    ] = Field(None, min_length=1, description="one, or a list, added up")
    mixout: float | None = Field(
        None, gt=0, lt=1, description="share of weights replaced by the source's in each forward"
    )
    stochnorm: float | None = Field(
        None, gt=0, le=1, description="share of BatchNorm channels on running statistics"
    )


def _freeze(value: object) -> object:
    if isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value):
        return tuple(value)
    if value in ("none", "backbone") or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ValueError(
        f"expected none, backbone, a number of groups from the input or a list of name patterns, "
        f"found {value!r}"
    )


class Stage(StageFields):
    """Which groups learn, at what rates, for how long."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", description="unique in the run")
    freeze: Annotated[
        Literal["none", "backbone"] | int | tuple[str, ...],
        BeforeValidator(_freeze),
    ] = Field("none", description="none, backbone, a number of groups from the input, or patterns")
    lora: dict[str, Any] | None = Field(
        None, description="an adapter on the frozen backbone: fields of peft.LoraConfig, and merge"
    )

    @model_validator(mode="after")
    def _adapter_on_frozen_weights(self) -> Stage:
        if self.lora is not None and self.freeze != "backbone":
            raise ValueError("lora goes with freeze: backbone; the adapter learns in its place")
        return self


class Frozen(StageFields):
    """Linear probe: the head learns, the backbone does not."""

    name: Literal["frozen"]


class Full(StageFields):
    """Everything learns from the first step."""

    name: Literal["full"]


class Gradual(StageFields):
    """Gradual unfreezing from the head down (ULMFiT, Howard & Ruder 2018).

    `epochs` is the whole length: what is left after the last group has thawed goes to the last
    stage, and a run too short to thaw everything stops where it is.
    """

    name: Literal["gradual"]
    epochs_per_group: float | None = Field(None, gt=0, description="epochs a stage; default 1")
    steps_per_group: int | None = Field(None, gt=0, description="steps a stage, instead")
    groups_per_step: int = Field(1, gt=0, description="groups that thaw together")
    last_group: str | int = Field(0, description="name or number of the lowest group to thaw")
    rate_decay: float | None = Field(
        None, gt=0, le=1, description="discriminative rates; layer_decay under ULMFiT's name"
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> Gradual:
        if self.epochs_per_group is not None and self.steps_per_group is not None:
            raise ValueError("epochs_per_group and steps_per_group exclude each other")
        for whole, share in (("epochs", "steps_per_group"), ("steps", "epochs_per_group")):
            if getattr(self, whole) is not None and getattr(self, share) is not None:
                raise ValueError(f"{whole} and {share} don't add up; give both in the same unit")
        if self.rate_decay is not None and self.layer_decay is not None:
            raise ValueError("rate_decay and layer_decay are the same thing; keep one of them")
        return self


class LpFt(StageFields):
    """Linear probe, then full fine-tuning (Kumar et al. 2022); `epochs` is both together."""

    name: Literal["lp_ft"]
    head_epochs: float | None = Field(None, gt=0, description="the probe's share; default: half")
    head_learning_rate: float | None = Field(None, ge=0, description="default: learning_rate")

    @model_validator(mode="after")
    def _one_unit(self) -> LpFt:
        if self.steps is not None and self.head_epochs is not None:
            raise ValueError("steps halves them; with head_epochs give the whole as epochs")
        return self


class Lora(StageFields):
    """Low-rank adapters beside the frozen weights, and the head (Hu et al. 2022).

    Keys other than these are the fields of peft.LoraConfig.
    """

    model_config = ConfigDict(extra="allow")
    name: Literal["lora"]
    merge: bool = Field(
        False, description="add the adapter to the weights for good; default: keep it apart too"
    )


StrategyConfig = Annotated[Frozen | Full | Gradual | LpFt | Lora, Field(discriminator="name")]


class Baseline(Recipe):
    """What the fine-tune must beat: the same network from scratch, or the source with a new head.

    Without a length of its own a baseline is given as many epochs as the whole fine-tune.
    """

    name: Literal["scratch", "frozen"]


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


def _feature_cache(value: object) -> object:
    """Let a mode, or a limit, stand for the section."""
    return whole_section("feature_cache", value)


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


class Config(Section):
    """One fine-tune: a task, a source model, data, and how to learn."""

    task: Annotated[TaskConfig, BeforeValidator(_named)]
    model: Annotated[ModelConfig, BeforeValidator(_named)]
    data: DataConfig
    strategy: Annotated[StrategyConfig | None, BeforeValidator(_named)] = Field(
        None, description="a name, or {name: ..., its options}; `full` if there are no stages"
    )
    stages: list[Stage] | None = Field(None, min_length=1, description="instead of a strategy")
    schedule: Literal["stage", "run"] = Field(
        "stage", description="the learning-rate schedule spans each stage, or the whole run"
    )
    baselines: list[Annotated[Baseline, BeforeValidator(_named)]] = Field(
        default_factory=list, description="trained in the same run, scored beside the result"
    )
    training: dict[str, Any] = Field(
        default_factory=dict, description="any field of transformers.TrainingArguments"
    )
    feature_cache: Annotated[FeatureCacheConfig, BeforeValidator(_feature_cache)] = Field(
        default_factory=FeatureCacheConfig,
        description="auto, on, off, a limit such as 20GB, or its fields",
    )
    hub: HubConfig | None = Field(None, description="push the result here at the end")
    output_dir: LocalPath = Field(
        description="the run folder; default: runs/NAME of the config file"
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="seeds the head, the data order and augmentation"
    )

    @model_validator(mode="after")
    def _strategy_or_stages(self) -> Config:
        if self.strategy is not None and self.stages is not None:
            raise ValueError("strategy and stages both say how to learn; keep one of them")
        names = [stage.name for stage in self.stages or []]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: each needs a name of its own; there are {names}")
        baselines = [baseline.name for baseline in self.baselines]
        if len(set(baselines)) < len(baselines):
            raise ValueError(f"baselines: each can stand once; there are {baselines}")
        return self
