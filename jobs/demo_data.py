"""Generated items, vectors and clicks with a planted structure, in the folder format of the README.

Items belong to sub-topics of topics; both modalities show the sub-topic with noise; a user likes some sub-topics and
clicks accordingly. Most items are shown rarely, so that an ID per item learns little of them and their topic must carry
the prediction: what semantic IDs are for.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.ctr.metrics import auc
from jobs.ctr.splits import TEST_SHARE

TRUTH = "truth.json"
DAY_SECONDS = 86_400
START = 1_750_000_000


def write_demo_data(
    folder: Path,
    *,
    items: int = 6000,
    users: int = 800,
    impressions: int = 150,
    topics: int = 12,
    subtopics: int = 8,
    seed: int = 0,
) -> None:
    """Write embeddings.parquet, items.parquet and, last, interactions.parquet into `folder`."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    topic = generator.integers(topics, size=items)
    subtopic = topic * subtopics + generator.integers(subtopics, size=items)
    ids = [f"item-{n:05d}" for n in range(items)]
    text = _vectors(generator, topic, subtopic, 64)
    image = _vectors(generator, topic, subtopic, 32)
    missing = generator.random(items) < 0.1
    _write_embeddings(folder / "embeddings.parquet", ids, text, image, missing)
    titles = [
        f"topic {t}, sub-topic {s % subtopics}, item {n}" for n, (t, s) in enumerate(zip(topic, subtopic, strict=True))
    ]
    pq.write_table(pa.table({"item_id": ids, "title": titles}), folder / "items.parquet")
    clicks, probability = _clicks(generator, ids, subtopic, users, impressions, topics, subtopics)
    late = np.arange(len(clicks)) >= (1 - TEST_SHARE) * len(clicks)
    best = auc(clicks["label"].to_numpy()[late].astype(np.float32), probability[late])
    (folder / TRUTH).write_text(json.dumps({"best_auc": best}) + "\n")
    pq.write_table(clicks, folder / "interactions.parquet")


def best_auc(folder: Path) -> float:
    """AUC of the probabilities that the clicks were drawn with, on the test split: no model can be expected to do
    better.
    """
    return float(json.loads((folder / TRUTH).read_text())["best_auc"])


def _vectors(generator: np.random.Generator, topic: np.ndarray, subtopic: np.ndarray, dim: int) -> np.ndarray:
    of_topic = generator.normal(size=(topic.max() + 1, dim))
    of_subtopic = generator.normal(size=(subtopic.max() + 1, dim))
    x = of_topic[topic] + 0.8 * of_subtopic[subtopic] + 0.6 * generator.normal(size=(len(topic), dim))
    return np.asarray(x, np.float32)


def _write_embeddings(path: Path, ids: list[str], text: np.ndarray, image: np.ndarray, missing: np.ndarray) -> None:
    rows_text: list[list[float]] = text.tolist()
    rows_image = [None if gone else row.tolist() for row, gone in zip(image, missing, strict=True)]
    bad = [  # one row each of what goes wrong in an export
        ("bad-nan", [float("nan"), *rows_text[0][1:]], None),
        ("bad-inf", [float("inf"), *rows_text[0][1:]], None),
        ("bad-zero", [0.0] * text.shape[1], None),
        ("bad-null", None, None),
        ("bad-short", rows_text[0][:10], None),
        (None, rows_text[0], None),
        (ids[0], rows_text[0], rows_image[0]),
        ("bad-twice", rows_text[1], None),
        ("bad-twice", rows_text[2], None),
    ]
    pq.write_table(
        pa.table(
            {
                "item_id": pa.array(ids + [row[0] for row in bad]),
                "text_embedding": pa.array(rows_text + [row[1] for row in bad], pa.list_(pa.float32())),
                "image_embedding": pa.array(rows_image + [row[2] for row in bad], pa.list_(pa.float32())),
            }
        ),
        path,
    )


def _clicks(
    generator: np.random.Generator,
    ids: list[str],
    subtopic: np.ndarray,
    users: int,
    impressions: int,
    topics: int,
    subtopics: int,
) -> tuple[pa.Table, np.ndarray]:
    """Impressions in order of time, and the probability of a click of each."""
    n = users * impressions
    user = np.repeat(np.arange(users), impressions)
    taste = 1.3 * generator.normal(size=(users, topics))[:, :, None] + 1.0 * generator.normal(
        size=(users, topics, subtopics)
    )
    taste = taste.reshape(users, -1)
    item = generator.integers(len(ids), size=n)  # every item about equally rare
    logit = -1.0 + 1.2 * taste[user, subtopic[item]] + 0.3 * generator.normal(size=len(ids))[item]
    probability = 1 / (1 + np.exp(-logit))
    label = (generator.random(n) < probability).astype(np.int32)
    timestamp = START + generator.integers(90 * DAY_SECONDS, size=n)
    order = np.argsort(timestamp, kind="stable")
    table = pa.table(
        {
            "user_id": pa.array([f"user-{u:04d}" for u in user[order]]),
            "item_id": pa.array(np.array(ids)[item[order]]),
            "timestamp": pa.array(timestamp[order]),
            "label": pa.array(label[order]),
        }
    )
    return table, probability[order]
