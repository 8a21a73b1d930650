"""Sections of the YAML file that stand for themselves: task, model, data, penalties, cache, Hub."""

from __future__ import annotations

import math
import os
import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
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
    attn_implementation: str | None = Field(
        None,
        description="sdpa, flash_attention_2, eager …; default: the fastest that is always there",
    )


class DataConfig(Section):
    """Where the examples are and which of them serve for what."""

    path: str = Field(
        description="Hub id, folder of images by class, CSV, JSON Lines, Parquet, plain text (an "
        "example a line) or saved dataset"
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
