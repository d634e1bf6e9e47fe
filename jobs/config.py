"""Every setting of the pipeline: one frozen model per stage, TOML files and `--set section.key=value` over the defaults.

`load_config` reports all mistakes at once, each with the value, what was expected and the nearest known name.
Jobs read this; the tokenizer library never does (jobs pass it plain numbers).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from jobs.redaction import redact, redact_config, redact_setting


class ConfigError(ValueError):
    """One or more settings are wrong; the message lists them all."""


MAX_DIM = 65536  # of one modality; a row of float32 is then 256 KiB


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SparkConfig(Section):
    master: str = Field("local[*]", description="Spark master URL; local[*] uses every core of this machine")
    driver_memory: str = Field("4g", description="heap of the driver JVM")
    conf: dict[str, str] = Field({}, description="further Spark properties; they win over the defaults of the profile")


class MlflowConfig(Section):
    tracking_uri: str = Field("", description="empty: a sqlite file beside the warehouse")
    experiment: str = "semantic-ids"


class LoadConfig(Section):
    source: str = Field("", description="Parquet file or folder, or a Delta table, with one row per item")
    source_format: Literal["auto", "parquet", "delta"] = Field(
        "auto", description="auto: Delta where the folder has a _delta_log, else Parquet"
    )
    snapshots: Literal["newest", "all"] = Field(
        "newest", description="of daily folders (dt=2026-01-31, year=/month=/day=): read the newest, or all of them"
    )
    item_id: str = Field("item_id", description="column with the item id, integer or string")
    modalities: dict[str, float] = Field(
        {}, description="vector column -> weight; empty: every `*_embedding` column, weight 1"
    )
    dims: dict[str, int] = Field({}, description="vector column -> dimension; empty: the commonest in the first rows")
    packed_dtype: dict[str, Literal["float32", "float16", "bfloat16", "float64", "int8", "uint8"]] = Field(
        {}, description="column of packed bytes -> what a component is; empty: what the bytes can only be, else refused"
    )
    normalize: bool = Field(True, description="scale each modality, then the fused vector, to unit length")
    dtype: Literal["float32", "float16"] = Field("float32", description="how a component is stored in item_embeddings")

    @field_validator("modalities")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if weight <= 0:
                raise ValueError(
                    f"weight of {name} is {weight}; expected a number above 0 (leave the modality out instead)"
                )
        return value

    @field_validator("dims")
    @classmethod
    def _possible(cls, value: dict[str, int]) -> dict[str, int]:
        for name, dim in value.items():
            if not 1 <= dim <= MAX_DIM:
                raise ValueError(f"dimension of {name} is {dim}; expected 1 to {MAX_DIM}")
        return value


class FitConfig(Section):
    levels: int = Field(2, ge=1, le=16, description="L, residual levels (the paper's 2)")
    components: int = Field(128, ge=2, le=65536, description="K, components of a level (the paper's 128)")
    method: Literal["annealed", "em", "kmeans"] = Field(
        "annealed", description="annealed is ours; em the paper's own (diagonal EM, no annealing); kmeans is RQ-KMeans"
    )
    seed: int = Field(0, ge=0)
    workers: int = Field(1, ge=1, description="processes of the fit; more than one runs on TorchDistributor")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the fit computes; auto takes a GPU if there is one"
    )
    sample: int = Field(0, ge=0, description="fit on about this many items, evenly spread; 0 for all")
    beam: int = Field(
        1,
        ge=1,
        le=64,
        description="tuples of codes that encode keeps from level to level; 1 is greedy; part of the codebook",
    )
    batch_rows: int = Field(8192, ge=1, description="rows of one batch in memory")
    memory_mib: int = Field(
        1024,
        ge=0,
        description="a process keeps its rows in memory if they take at most this; more are read again in each pass",
    )


HOW_TO_FIT = {"workers", "device", "batch_rows", "memory_mib"}  # the codebook is the same


class EncodeConfig(Section):
    rows_per_batch: int = Field(8192, ge=1, description="rows that a task reads and encodes at a time")
    hold: float = Field(
        1.1,
        ge=1,
        description="after a refit an unchanged item keeps its codes while their squared error is within this ratio of the best",
    )


class EvaluateConfig(Section):
    neighbour_sample: int = Field(2000, ge=20, description="items of the neighbour-recall sample")


class GateConfig(Section):
    """Limits of the promotion gate. A metric beyond its limit fails the verdict; the reasons name both numbers."""

    min_utilization: float = Field(0.5, ge=0, le=1, description="least share of components in use, at every level")
    min_perplexity: float = Field(0.2, ge=0, le=1, description="least perplexity / K, at every level")
    min_distinct: float = Field(
        0.1, ge=0, le=1, description="least share of items with a code tuple of their own or first"
    )
    max_collision_share: float = Field(0.05, gt=0, le=1, description="largest group of equal codes / items")
    max_rmse_ratio: float = Field(1.05, gt=0, description="RMSE against the champion's on the same items")
    max_churn: float = Field(
        0.10, ge=0, le=1, description="share of the champion's items whose codes change on a refit"
    )


class TrainConfig(Section):
    interactions: str = Field("", description="Parquet of user_id, item_id and label | rating, timestamp | order")
    history: int = Field(200, ge=1, description="most recent behaviours kept per example")
    click_rating: float = Field(4.0, description="a rating at or above it is a click")
    negatives: int = Field(4, ge=1, description="sampled negatives per positive where the log has positives only")
    interest_codebooks: int = Field(4, ge=1, description="N of DMQN")
    codewords: int = Field(25, ge=1, description="W of DMQN; N x W is about 100 in the paper")
    width: int = Field(32, ge=4, description="D, width of behaviour and cluster vectors")
    epochs: int = Field(3, ge=1, description="at most; training stops when the validation AUC falls")
    batch_size: int = Field(256, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    seed: int = Field(0, ge=0)


class NightlyConfig(Section):
    refit_every_days: int = Field(30, ge=1, description="a refit is due when the champion is older")
    max_likelihood_drop: float = Field(
        1.0, gt=0, description="refit when the new items' mean log-likelihood falls this many standard deviations"
    )


class Config(BaseSettings):
    """The resolved configuration of one command; stored with every run without its credentials."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    warehouse: str = Field("warehouse", description="folder or URI under which every table lives")
    spark: SparkConfig = SparkConfig()
    mlflow: MlflowConfig = MlflowConfig()
    load: LoadConfig = LoadConfig()
    fit: FitConfig = FitConfig()
    encode: EncodeConfig = EncodeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    train: TrainConfig = TrainConfig()
    nightly: NightlyConfig = NightlyConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        **_: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # files and --set only: a stray environment variable must not change a night

    def digest(self, *sections: str) -> str:
        """Short hash of the named sections: 'the same inputs' of a stage include its settings, but for those that change
        only how it runs."""
        values = self.model_dump(mode="json", exclude={"fit": HOW_TO_FIT})
        chosen = {name: values[name] for name in sections}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def load_config(files: Iterable[Path] = (), overrides: Iterable[str] = (), **top: str) -> Config:
    """Defaults, then each TOML file, then `section.key=value` overrides, then keyword values; all mistakes at once.

    Raises:
        ConfigError: every wrong key and value, each with what was expected.
    """
    values: dict[str, Any] = {}
    mistakes: list[str] = []
    for file in files:
        try:
            _merge(values, tomllib.loads(Path(file).read_text()))
        except FileNotFoundError:
            mistakes.append(
                f"configuration file {file} does not exist; give the path of a TOML file such as infra/conf/local.toml"
            )
        except tomllib.TOMLDecodeError as error:
            mistakes.append(f"configuration file {file} is not TOML: {error}")
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            name = (override.split() or [override])[0]  # a value may be a credential
            mistakes.append(f"--set {name} has no '='; expected section.key=value, such as fit.components=256")
            continue
        nested: Any = _toml_value(text)
        for part in reversed(path.strip().split(".")):
            nested = {part: nested}
        _merge(values, nested)
    _merge(values, {name: value for name, value in top.items() if value})
    redact_config(os.environ)  # from here on `redact` masks the credentials of the environment and the settings
    redact_config(values)
    try:
        config = Config(**values)
    except ValidationError as error:
        mistakes += [_sentence(item) for item in error.errors()]
    if mistakes:
        raise ConfigError("\n".join(f"  {number}. {redact(text)}" for number, text in enumerate(mistakes, 1)))
    return config


def parse_date(text: str) -> date:
    """A run date as YYYY-MM-DD."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"date {text!r} is not a day of the calendar; expected YYYY-MM-DD, such as 2026-01-31"
        ) from None


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _toml_value(text: str) -> object:
    """`256` is a number, `true` a truth value, `{a = 1}` a table; anything else is the text as typed."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _sentence(error: Any) -> str:
    place = [str(part) for part in error["loc"]]
    name = ".".join(place)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_names()
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4) or difflib.get_close_matches(
            place[-1], known, n=1, cutoff=0.4
        )
        hint = f"did you mean {near[0]}?" if near else f"known sections: {', '.join(Config.model_fields)}"
        return f"{name} is not a setting; {hint}"
    return f"{name} = {redact_setting(name, error['input'])!r}: {error['msg']}"


def _known_names() -> list[str]:
    names = []
    for section, field in Config.model_fields.items():
        names.append(section)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += [f"{section}.{key}" for key in field.annotation.model_fields]
    return names
