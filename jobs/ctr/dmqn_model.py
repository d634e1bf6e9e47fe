"""The CTR model as an MLflow pyfunc: behaviours and a candidate in, probability of a click out, without Spark.

Models from code: MLflow runs this file at load time; the artefact is a folder as `jobs.ctr.artefact` writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import torch

from jobs.ctr.artefact import load_model
from jobs.ctr.batch import UserBatch
from jobs.ctr.user_table import USERS, ModelInputs, UserTable

INPUT = ("item_id", "ts", "codes", "weights", "history", "features")


class DMQNModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """`predict` takes a frame with a row per impression and these columns:

    item_id: text.
    codes, weights: the item's alternates level by level, as in `ctr_examples`; empty lists without a semantic ID.
    ts: time of the impression in microseconds since 1970, or its position in a log with `order`.
    history: list of {"item_id", "ts", "codes", "weights"}, the user's clicks before the impression, oldest first.
    features: list of the numeric features that the manifest names.

    It returns the probability of a click per row, shape (n,).
    """

    _skip_type_hint_validation = True  # else MLflow warns everyone who loads it; the input is checked here

    def load_context(self, context: Any) -> None:
        self.ctr = load_model(Path(context.artifacts["artefact"]))

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        missing = [name for name in INPUT if name not in model_input.columns]
        if missing:
            raise ValueError(f"the input lacks the columns {missing}; expected {', '.join(INPUT)}")
        if not len(model_input):
            return np.empty(0, np.float32)
        batch = impressions_batch(model_input, self.ctr.inputs)
        with torch.no_grad():
            return self.ctr.model(batch).sigmoid().numpy()


def impressions_batch(frame: Any, inputs: ModelInputs) -> UserBatch:
    """The rows of a frame as `predict` takes it, each as a user of its own with one impression."""
    rows = frame.to_dict("records")
    unused = {"label": 0, "split": "test", "shown": 0}
    columns = {
        "user_id": [str(number) for number in range(len(rows))],
        "behaviours": [list(row["history"]) for row in rows],
        "impressions": [[{**row, "known": len(row["history"]), **unused}] for row in rows],
    }
    users = UserTable.of(pa.table(columns, schema=USERS), "test", inputs)
    return users.batch(np.arange(len(rows)))


mlflow.models.set_model(DMQNModel())
