"""The CTR model as an MLflow pyfunc: history and candidate in, probability of a click out, without Spark.

Models from code: MLflow runs this file at load time; the artefact is a folder of safetensors + manifest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from safetensors.torch import load_file

try:
    from jobs.ctr.padded_dmqn import DMQN, DMQNShape
except ModuleNotFoundError:  # loaded where this project is not installed: the module travels with the model
    from padded_dmqn import DMQN, DMQNShape  # type: ignore[import-not-found, no-redef]


class DMQNModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """`predict` takes a frame of item_id, history (list of item ids, oldest first) and features (list of floats)."""

    _skip_type_hint_validation = True  # else MLflow warns everyone who loads it; the input is checked here, in words

    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts["artefact"])
        manifest = json.loads((folder / "manifest.json").read_text())
        tensors = load_file(str(folder / "dmqn.safetensors"))
        self.tokens = tensors.pop("item_tokens")
        self.row = {item: number for number, item in enumerate(manifest["items"], start=1)}
        self.model = DMQN(DMQNShape(**manifest["shape"]))
        self.model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items()})
        self.model.eval()

    # Without annotations: MLflow reads those of `predict` as a schema.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Probability of a click per row. An item the model does not know is treated as padding."""
        longest = max(1, max((len(history) for history in model_input["history"]), default=1))
        history = torch.zeros(len(model_input), longest, dtype=torch.int64)
        for row, items in enumerate(model_input["history"]):
            if len(items):
                history[row, -len(items) :] = torch.tensor([self.row.get(item, 0) for item in items])
        item = torch.tensor([self.row.get(item, 0) for item in model_input["item_id"]])
        features = torch.tensor(np.stack(model_input["features"].to_list()), dtype=torch.float32)
        with torch.no_grad():
            logits = self.model(history, self.tokens[history], item, self.tokens[item], features)
        scores = logits.sigmoid().numpy()
        return scores


mlflow.models.set_model(DMQNModel())
