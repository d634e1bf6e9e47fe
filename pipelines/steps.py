"""The steps of a night as data: what each runs, needs, reads and writes. Standard library only, so that a scheduler
may import it without loading torch or Spark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Step:
    name: str
    needs: tuple[str, ...]  # steps that must have succeeded
    reads: tuple[str, ...]  # tables, or models by registered name
    writes: tuple[str, ...]
    device: Literal["cpu", "gpu"]  # where it runs on a cluster that has both
    does: str

    @property
    def command(self) -> tuple[str, ...]:
        return ("sid", self.name)


NIGHT = (
    Step(
        "load",
        (),
        (),
        ("item_embeddings", "rejected_embeddings"),
        "cpu",
        "raw vectors -> fused embeddings, or a reason",
    ),
    Step(
        "fit",
        ("load",),
        ("item_embeddings",),
        ("semantic-id-codebook",),
        "gpu",
        "embeddings -> codebook (RQ-GMM), as candidate",
    ),
    Step(
        "encode",
        ("fit",),
        ("item_embeddings", "semantic-id-codebook"),
        ("semantic_ids",),
        "cpu",
        "embeddings + codebook -> semantic IDs",
    ),
    Step(
        "evaluate",
        ("encode",),
        ("item_embeddings", "semantic_ids"),
        ("quality_reports",),
        "cpu",
        "quality of the IDs, and the verdict",
    ),
    Step("promote", ("evaluate",), ("quality_reports",), ("releases",), "cpu", "champion moves if the verdict passed"),
    Step(
        "train",
        ("promote",),
        ("releases", "semantic_ids"),
        ("ctr_examples", "dmqn-ctr"),
        "gpu",
        "CTR model (DMQN) on the released IDs",
    ),
)
