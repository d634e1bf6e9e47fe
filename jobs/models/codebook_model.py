"""The codebook as an MLflow pyfunc: embeddings in, semantic codes out, without Spark.

Models from code: MLflow runs this file at load time; the artefact is the codebook folder (safetensors + manifest).
"""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch

from tokenizer import load_codebook
from tokenizer.alternates import ALTERNATES
from tokenizer.packed import unpack_row


class CodebookModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """`predict` takes a matrix (N, D), or a frame whose column `embedding` holds packed bytes or lists of floats."""

    _skip_type_hint_validation = True  # without it MLflow warns on loading; the input is checked here

    def load_context(self, context: Any) -> None:
        self.codebook = load_codebook(context.artifacts["artefact"])

    # Without annotations: MLflow reads those of `predict` as a schema.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """A frame with codes (a list of L ints), alternates, confidence and log-likelihood of each row.

        The alternates have per level the most probable codes and their weights in 1/255.
        """
        x = torch.from_numpy(_matrix(model_input, self.codebook.rqgmm.dim))
        assignment = self.codebook.encode(x, alternates=ALTERNATES)
        soft = assignment.alternates
        assert soft is not None
        return pd.DataFrame(
            {
                "codes": assignment.codes.tolist(),
                "alternates": [
                    [{"codes": codes, "weights": weights} for codes, weights in zip(*levels, strict=True)]
                    for levels in zip(soft.codes.tolist(), soft.weights.tolist(), strict=True)
                ],
                "confidence": assignment.confidence.numpy(),
                "log_likelihood": assignment.log_likelihood.numpy(),
                "codebook_hash": self.codebook.hash,
            }
        )


def _matrix(model_input: Any, dim: int) -> np.ndarray:
    if isinstance(model_input, pd.DataFrame):
        column = model_input.get("embedding")
        if column is not None:
            rows = [_vector(value, dim) for value in column]
            return np.stack(rows) if rows else np.empty((0, dim), np.float32)
        model_input = model_input.to_numpy()
    x = np.ascontiguousarray(model_input, dtype=np.float32)
    if x.ndim != 2 or x.shape[1] != dim:
        raise ValueError(
            f"embeddings have shape {x.shape}; expected (N, {dim}), the dimension this codebook was fitted on"
        )
    return x


def _vector(value: Any, dim: int) -> np.ndarray:
    if isinstance(value, bytes):
        return unpack_row(value, dim)
    x = np.asarray(value, dtype=np.float32)
    if x.shape != (dim,):
        raise ValueError(
            f"an embedding has {x.size} components; expected {dim}, the dimension this codebook was fitted on"
        )
    return x


mlflow.models.set_model(CodebookModel())
