"""The schema of the YAML file: what may be written, and in which units."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from hfft.sections import (
    AverageConfig,
    DataConfig,
    FeatureCacheConfig,
    HubConfig,
    LocalPath,
    ModelConfig,
    PenaltyConfig,
    RetentionConfig,
    Section,
    TaskConfig,
    by_name,
)
from hfft.yaml_file import whole_section


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


def _freeze_of_tower(value: object) -> object:
    if value in (None, "none", "backbone"):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(
        f"expected none, backbone or a number of groups from the tower's input, found {value!r}"
    )


class TowerFields(Section):
    """What is otherwise in one tower of a model that has several."""

    freeze: Annotated[
        Literal["none", "backbone"] | int | None, BeforeValidator(_freeze_of_tower)
    ] = Field(None, description="none, backbone (all of the tower) or a number of its groups")
    learning_rate: float | None = Field(None, ge=0, description="in place of the stage's")
    layer_decay: float | None = Field(None, gt=0, le=1, description="in place of the stage's")

    @model_validator(mode="after")
    def _says_something(self) -> TowerFields:
        if not self.model_dump(exclude_none=True):
            raise ValueError("give one or more of freeze, learning_rate and layer_decay")
        return self


class ContrastiveConfig(Section):
    """How many pairs are contrasted in a step, and how they pass the towers."""

    global_batch: int | None = Field(
        None,
        gt=1,
        description="pairs of a step, of all processes together; default: "
        "training.per_device_train_batch_size of each",
    )
    chunk: int | None = Field(
        None,
        gt=0,
        description="pairs that pass the towers at a time in each process: gradients are those of "
        "the whole batch, in the memory of a chunk, at a third more time; without it the model "
        "also makes a matrix of all pairs of a process",
    )

    @model_validator(mode="after")
    def _says_something(self) -> ContrastiveConfig:
        if self.global_batch is None and self.chunk is None:
            raise ValueError("give global_batch, chunk, or both")
        return self


class StageFields(Recipe):
    """A recipe, what is otherwise in a tower, and what holds the weights to the source."""

    towers: dict[str, TowerFields] | None = Field(
        None,
        min_length=1,
        description="of a model of several towers, what is otherwise in one: {vision: {freeze: "
        "backbone}}; hfft plan has their names",
    )
    contrastive: ContrastiveConfig | None = Field(
        None, description="of a task that contrasts pairs: its global batch, and in which chunks"
    )
    penalty: Annotated[
        tuple[PenaltyConfig, ...] | None, Field(strict=False), BeforeValidator(_listed)
    ] = Field(None, min_length=1, description="one, or a list, added up")
    mixout: float | None = Field(
        None, gt=0, lt=1, description="share of weights replaced by the source's in each forward"
    )
    stochnorm: float | None = Field(
        None, gt=0, le=1, description="share of BatchNorm channels on running statistics"
    )

    def of_towers(self, field: str) -> dict[str, Any]:
        """Return what towers have in the place of a field of the stage, by tower."""
        found = {name: getattr(own, field) for name, own in (self.towers or {}).items()}
        return {name: value for name, value in found.items() if value is not None}


def _check_below_adapter(freeze: object, fields: StageFields) -> None:
    if {freeze, *fields.of_towers("freeze").values()} != {"backbone"}:
        raise ValueError("lora goes with freeze: backbone; the adapter learns in its place")


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
    task: Annotated[TaskConfig | None, BeforeValidator(by_name)] = Field(
        None, description="another task than the run's, with a head of its own on the same body"
    )
    data: DataConfig | None = Field(None, description="of the stage's task; default: the run's")

    @model_validator(mode="after")
    def _data_of_a_task(self) -> Stage:
        if self.data is not None and self.task is None:
            raise ValueError("data goes with task; a stage of the run's task has the run's data")
        if self.data is not None and self.data.test is not None:
            raise ValueError("data.test is scored at a run's end, not a stage's; leave it out here")
        return self

    @model_validator(mode="after")
    def _adapter_on_frozen_weights(self) -> Stage:
        if self.lora is not None:
            _check_below_adapter(self.freeze, self)
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

    @model_validator(mode="after")
    def _adapter_on_frozen_weights(self) -> Lora:
        _check_below_adapter("backbone", self)
        return self


StrategyConfig = Annotated[Frozen | Full | Gradual | LpFt | Lora, Field(discriminator="name")]


class Baseline(Recipe):
    """What the fine-tune must beat: the same network from scratch, or the source with a new head.

    Without a length of its own a baseline is given as many epochs as the whole fine-tune.
    """

    name: Literal["scratch", "frozen"]


def _feature_cache(value: object) -> object:
    """Let a mode, or a limit, stand for the section."""
    return whole_section("feature_cache", value)


def _average(value: object) -> object:
    """Let a kind stand for the section."""
    return whole_section("average", value)


class Config(Section):
    """One fine-tune: a task, a source model, data, and how to learn."""

    task: Annotated[TaskConfig, BeforeValidator(by_name)]
    model: Annotated[ModelConfig, BeforeValidator(by_name)]
    data: DataConfig
    strategy: Annotated[StrategyConfig | None, BeforeValidator(by_name)] = Field(
        None, description="a name, or {name: ..., its options}; `full` if there are no stages"
    )
    stages: list[Stage] | None = Field(None, min_length=1, description="instead of a strategy")
    batch_tokens: int | None = Field(
        None,
        gt=0,
        description="tokens of a training batch, padding included, instead of "
        "per_device_train_batch_size; batches are then of texts of like lengths",
    )
    schedule: Literal["stage", "run"] = Field(
        "stage", description="the learning-rate schedule spans each stage, or the whole run"
    )
    baselines: list[Annotated[Baseline, BeforeValidator(by_name)]] = Field(
        default_factory=list, description="trained in the same run, scored beside the result"
    )
    average: Annotated[AverageConfig | None, BeforeValidator(_average)] = Field(
        None,
        description="a kind, or {kind: ..., its options}: the weights of which average are the "
        "run's result",
    )
    retention: RetentionConfig | None = Field(
        None,
        description="a second data set, scored with the source and with the fine-tuned model: what "
        "was forgotten",
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

    @model_validator(mode="after")
    def _last_stage_is_of_the_task(self) -> Config:
        if self.stages is not None and self.stages[-1].task is not None:
            raise ValueError(
                "stages: the last one has a task of its own; what a run comes to is of the run's "
                "task, so the last stage must be"
            )
        return self

    @model_validator(mode="after")
    def _one_batch_size(self) -> Config:
        if self.batch_tokens is not None and "per_device_train_batch_size" in self.training:
            raise ValueError(
                "batch_tokens and training.per_device_train_batch_size both set the batch; keep "
                "one of them"
            )
        return self
