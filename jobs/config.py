"""Every setting of the pipeline: one frozen model per stage, with type, default, bounds and description.

`jobs/read_config.py` reads them from TOML files and `--set`; `docs/configuration.md` is generated from them. Numbers
are bounded on both sides, since a value beyond the bounds is a typing error. The library `tokenizer` gets plain
numbers, no Config.
"""

from __future__ import annotations

import re
from datetime import date, datetime, time
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from jobs.fingerprint import fingerprint

LARGEST_SEED = 2**32 - 1  # that NumPy, torch and faiss all take


class ConfigError(ValueError):
    """One or more settings are wrong; the message lists them all."""

    def __init__(self, *mistakes: str) -> None:
        self.mistakes = mistakes
        numbered = "\n".join(f"  {number}. {text}" for number, text in enumerate(mistakes, 1))
        super().__init__(mistakes[0] if len(mistakes) == 1 else f"{len(mistakes)} settings are wrong:\n{numbered}")


def _as_text(value: object) -> object:
    """`20260101`, `true` and `2026-01-31` are text where text is wanted."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    return value.isoformat() if isinstance(value, date | datetime | time) else value


def _as_whole(value: object) -> object:
    """`1e5` is a whole number: large ones are often written in this form."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, BeforeValidator(_as_text)]
Whole = Annotated[int, BeforeValidator(_as_whole)]
Seed = Annotated[
    int, BeforeValidator(_as_whole), Field(ge=0, le=LARGEST_SEED, description="seed of the random numbers")
]


MAX_DIM = 65536  # of one modality; a row of float32 is then 256 KiB


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class SparkConfig(Section):
    master: Text = Field("local[*]", description="Spark master URL; local[*] uses every core of this machine")
    driver_memory: Text = Field("4g", description="heap of the driver JVM")
    conf: dict[str, Text] = Field({}, description="further Spark properties; they win over the defaults of the profile")

    @field_validator("master")
    @classmethod
    def _known_master(cls, value: str) -> str:
        count = r"([1-9]\d{0,3}|\*)"
        local = rf"local(\[{count}(,[1-9]\d{{0,3}})?\])?|local-cluster\[[1-9]\d{{0,3}},[1-9]\d{{0,3}},[1-9]\d{{2,6}}\]"
        if not re.fullmatch(rf"{local}|spark://[^\s/]+|yarn|k8s://\S+", value, re.ASCII):
            raise ValueError("expected local, local[4], local[*], spark://host:port, yarn or k8s://...")
        return value

    @field_validator("driver_memory")
    @classmethod
    def _memory(cls, value: str) -> str:
        match = re.fullmatch(r"(\d{1,9})([kmgt])b?", value, re.IGNORECASE | re.ASCII)
        mib = int(match[1]) * {"k": 1 / 1024, "m": 1, "g": 1024, "t": 1024**2}[match[2].lower()] if match else 0
        if not 512 <= mib <= 16 * 1024**2:  # Spark itself refuses to start with less than 450 MiB
            raise ValueError("expected a number with its unit, such as 4g or 4096m, from 512m to 16t")
        return value


class MlflowConfig(Section):
    tracking_uri: Text = Field("", description="empty: a sqlite file beside the warehouse")
    experiment: Text = Field("semantic-ids", min_length=1, description="MLflow experiment of the runs")
    catalogue: Text = Field(
        "",
        pattern=r"^[A-Za-z0-9._-]*$",
        description="suffix of the registered model names where several catalogues share an MLflow server; the default "
        "store needs none",
    )


class LoadConfig(Section):
    source: Text = Field("", description="Parquet file or folder, or a Delta table, with one row per item")
    source_format: Literal["auto", "parquet", "delta"] = Field(
        "auto", description="auto: Delta where the folder has a _delta_log, else Parquet"
    )
    snapshots: Literal["newest", "all"] = Field(
        "newest", description="of daily folders (dt=2026-01-31, year=/month=/day=): read the newest, or all of them"
    )
    item_id: Text = Field("item_id", description="column with the item id, integer or string")
    modalities: dict[str, float] = Field(
        {}, description="vector column -> weight; empty: every `*_embedding` column, weight 1"
    )
    dims: dict[str, Whole] = Field({}, description="vector column -> dimension; empty: the commonest in the first rows")
    packed_dtype: dict[str, Literal["float32", "float16", "bfloat16", "float64", "int8", "uint8"]] = Field(
        {}, description="column of packed bytes -> what a component is; empty: inferred if only one type fits"
    )
    normalize: bool = Field(True, description="scale each modality, then the fused vector, to unit length")
    dtype: Literal["float32", "float16"] = Field("float32", description="how a component is stored in item_embeddings")

    @field_validator("modalities")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if not 0 < weight <= 1e6:
                raise ValueError(
                    f"weight of {name} is {weight}; expected a number above 0 and at most 1e6 (leave a modality out "
                    "instead of 0)"
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
    levels: Whole = Field(2, ge=1, le=16, description="L, residual levels (the paper's 2)")
    components: Whole = Field(128, ge=2, le=65536, description="K, components of a level (the paper's 128)")
    method: Literal["annealed", "em", "kmeans"] = Field(
        "annealed", description="annealed is ours; em the paper's own (diagonal EM, no annealing); kmeans is RQ-KMeans"
    )
    seed: Seed = 0
    workers: Whole = Field(1, ge=1, le=1024, description="processes of the fit; more than one runs on TorchDistributor")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the fit computes; auto takes a GPU if there is one"
    )
    sample: Whole = Field(0, ge=0, le=10**12, description="fit on about this many items, evenly spread; 0 for all")
    beam: Whole = Field(
        1,
        ge=1,
        le=64,
        description="tuples of codes that encode keeps from level to level; 1 is greedy; stored in the codebook",
    )
    batch_rows: Whole = Field(8192, ge=1, le=10**7, description="rows of one batch in memory")
    memory_mib: Whole = Field(
        1024,
        ge=0,
        le=2**24,
        description="a process keeps its rows in memory if they take at most this; more are read again in each pass",
    )


HOW_TO_FIT = {"workers", "device", "batch_rows", "memory_mib"}  # settings that do not change the codebook


class EncodeConfig(Section):
    alternates: Whole = Field(
        8,
        ge=0,
        le=64,
        description="codes a level that a soft semantic ID keeps, each with a weight; 0: no soft semantic IDs",
    )
    rows_per_batch: Whole = Field(8192, ge=1, le=10**7, description="rows that a task reads and encodes at a time")
    hold: float = Field(
        1.1,
        ge=1,
        le=1000,
        description="after a refit an unchanged item keeps its codes while their squared error is within this ratio of "
        "the best",
    )


class EvaluateConfig(Section):
    neighbour_sample: Whole = Field(2000, ge=20, le=10**6, description="items of the neighbour-recall sample")


class GateConfig(Section):
    """Limits of the promotion gate. A metric beyond its limit fails the verdict; the reasons name both numbers."""

    min_utilization: float = Field(0.5, ge=0, le=1, description="least share of components in use, at every level")
    min_perplexity: float = Field(0.2, ge=0, le=1, description="least perplexity / K, at every level")
    min_distinct: float = Field(0.1, ge=0, le=1, description="least number of distinct code tuples / items")
    max_collision_share: float = Field(
        0.05, gt=0, le=1, description="largest share of the items that one group of equal codes may have"
    )
    max_rmse_ratio: float = Field(1.05, gt=0, le=1000, description="largest RMSE / the champion's on the same items")
    max_churn: float = Field(
        0.10, ge=0, le=1, description="largest share of the champion's items whose codes change in a refit"
    )


class CtrGateConfig(Section):
    """By how much a new CTR model may be worse than the champion on the same impressions. After a change of limits the
    next run judges a refused model again, without training; a model that has passed stays passed.
    """

    max_auc_drop: float = Field(
        0.002,
        ge=0,
        le=1,
        description="largest drop of AUC, GAUC, or AUC of cold items if enough of them are shown; fails where the "
        "whole 95 % interval is worse",
    )
    max_log_loss_rise: float = Field(
        0.002,
        ge=0,
        le=100,
        description="largest rise of the log-loss in nats; fails where the whole 95 % interval is worse",
    )
    max_calibration_drift: float = Field(
        0.1, ge=0, le=100, description="largest rise of |log(mean prediction / click rate)|"
    )


class TrainConfig(Section):
    interactions: Text = Field(
        "", description="Parquet or Delta table of user_id, item_id and label | rating, timestamp | order"
    )
    max_share_without_id: float = Field(
        0.5,
        ge=0,
        le=1,
        description="largest share of interactions with items that have no semantic ID; above it training is refused, "
        "as the log seems to be about another catalogue; 1 allows all",
    )
    history: Whole = Field(200, ge=1, le=100_000, description="most recent behaviours kept per example")
    click_rating: float = Field(4.0, ge=-1e9, le=1e9, description="a rating at or above it is a click")
    negatives: Whole = Field(
        4, ge=1, le=1000, description="sampled negatives per positive where the log has positives only"
    )
    negative_sampling: Literal["uniform", "popularity"] = Field(
        "uniform",
        description="how negatives are drawn from the items that are as new to the user and to the log as the positive",
    )
    tokens: Literal["soft", "level", "prefix", "soft-prefix", "pieces"] = Field(
        "soft",
        description="how codes become tokens: one a level with the code's alternates weighted (soft) or without them "
        "(level), one a prefix of the codes, or one a piece, of which codes that are often shown together are one "
        "(pieces)",
    )
    token_rows: Whole = Field(
        2**16,
        ge=2,
        le=2**31,
        description="rows of the token table; tuples and prefixes of codes are hashed to it; the number of pieces is "
        "at most one less, and fewer of them are shared by more items",
    )
    item_rows: Whole = Field(2**16, ge=2, le=2**31, description="rows of the item table; item ids are hashed to it")
    control: bool = Field(
        False,
        description="also train the same model without semantic IDs, to see what they are worth (twice the time); "
        "asked for later, both are trained",
    )
    warm_start: bool = Field(
        False,
        description="start from the champion's parameters, under a new codebook with tokens that keep the items' "
        "vectors: good from the first step, in the end worse (docs/ctr.md); not with train.control",
    )
    interest_codebooks: Whole = Field(2, ge=1, le=1024, description="N, interest codebooks of DMQN")
    codewords: Whole = Field(
        50, ge=1, le=65536, description="W, codewords of each interest codebook; N x W is about 100 in the paper"
    )
    width: Whole = Field(32, ge=4, le=8192, description="D, width of behaviour and cluster vectors")
    by_distribution: bool = Field(
        False, description="read numeric features by their place among the values seen in training (DAES)"
    )
    experts: Whole = Field(0, ge=0, le=1024, description="experts of the MLP's first layer (SD-MoE); 0 = a plain layer")
    epochs: Whole = Field(3, ge=1, le=10_000, description="at most; training stops when the validation AUC falls")
    batch_positions: Whole = Field(
        1024,
        ge=1,
        le=10**8,
        description="behaviours (with padding) and impressions of one step; a user with more impressions is cut",
    )
    learning_rate: float = Field(3e-3, gt=0, le=10, description="of the optimizer")
    workers: Whole = Field(
        1,
        ge=1,
        le=1024,
        description="processes of the training, which share each step; more than one runs on TorchDistributor",
    )
    threads: Whole = Field(
        1,
        ge=1,
        le=1024,
        description="threads of a process of the training on a CPU; more help only where no other work is: they wait "
        "for each other after each of many small operations",
    )
    seed: Seed = 0


class CacheConfig(Section):
    redis: Text = Field(
        "", description="URL of a server with the Redis protocol that gets the interests too; empty: none"
    )


class NightlyConfig(Section):
    refit_every_days: Whole = Field(30, ge=1, le=36500, description="a refit is due when the champion is older")
    max_likelihood_drop: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="refit when the new items' mean log-likelihood is this many standard deviations below that of the "
        "earlier ones",
    )


class Config(BaseSettings):
    """The resolved configuration of one command; stored with every run without its credentials."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    warehouse: Text = Field("warehouse", min_length=1, description="folder or URI under which every table lives")
    spark: SparkConfig = SparkConfig()
    mlflow: MlflowConfig = MlflowConfig()
    load: LoadConfig = LoadConfig()
    fit: FitConfig = FitConfig()
    encode: EncodeConfig = EncodeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    train: TrainConfig = TrainConfig()
    ctr_gate: CtrGateConfig = CtrGateConfig()
    cache: CacheConfig = CacheConfig()
    nightly: NightlyConfig = NightlyConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # files and --set only: a stray environment variable must not change a night

    def digest(self, *sections: str) -> str:
        """Short hash of the named sections, without the settings that do not change the result (HOW_TO_FIT)."""
        values = self.model_dump(mode="json", exclude={"fit": HOW_TO_FIT})
        chosen = {name: values[name] for name in sections}
        return fingerprint(chosen)[:16]
