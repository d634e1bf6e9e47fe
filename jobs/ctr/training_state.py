"""What a training that is killed goes on from: one file of tensors, replaced as a whole."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

import torch
from pyarrow import fs
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

from jobs.files.filesystem import filesystem_of, write_file

FORMAT = 1


@dataclass(frozen=True, eq=False)
class TrainingState:
    """A model within an epoch, its optimizer, and the model of the best epoch.

    Attributes:
        model, best: State dictionaries.
        optimizer: Tensors of the optimizer by `number of the parameter.name`.
        epoch, batch: Epochs, and batches of the next one, that are done.
        examples, loss: Of these batches, the loss as a sum.
        validation_auc: Of each epoch done.
    """

    model: dict[str, Tensor]
    best: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    epoch: int
    batch: int
    examples: int
    loss: float
    validation_auc: tuple[float, ...]

    @staticmethod
    def of(model: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor], *numbers: Any) -> TrainingState:
        """The state of now; it shares memory with the model, so write it before the next step."""
        moments = {
            f"{number}.{name}": value
            for number, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        return TrainingState(model.state_dict(), best, moments, *numbers)

    @staticmethod
    def before(model: nn.Module) -> TrainingState:
        """The state before the first step."""
        return TrainingState(model.state_dict(), copy.deepcopy(model.state_dict()), {}, 0, 0, 0, 0.0, ())

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.load_state_dict(self.model)
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in self.optimizer.items():
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A file at `uri`, written every `every` batches and after each epoch.

    Attributes:
        key: Names the work (data, settings, recipe): a state of other work is not gone on from.
    """

    uri: str
    key: str
    every: int = 200

    def save(self, state: TrainingState) -> None:
        tensors = {
            f"{part}/{name}": value.detach().cpu().contiguous()
            for part in ("model", "best", "optimizer")
            for name, value in getattr(state, part).items()
        }
        numbers = {
            "format": FORMAT,
            "key": self.key,
            "epoch": state.epoch,
            "batch": state.batch,
            "examples": state.examples,
            "loss": state.loss,
            "validation_auc": state.validation_auc,
        }
        filesystem, path = filesystem_of(self.uri)
        tensors["numbers"] = torch.frombuffer(bytearray(json.dumps(numbers).encode()), dtype=torch.uint8)
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        write_file(filesystem, path, bytes_of(tensors))

    def load(self) -> TrainingState | None:
        """The state written last, None without one of this work."""
        filesystem, path = filesystem_of(self.uri)
        if filesystem.get_file_info(path).type == fs.FileType.NotFound:
            return None
        with filesystem.open_input_stream(path) as stream:
            tensors = tensors_of(stream.read())
        numbers = json.loads(bytes(tensors.pop("numbers").tolist()))
        if (numbers.pop("format"), numbers.pop("key")) != (FORMAT, self.key):
            return None
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, key = name.partition("/")
            parts[part][key] = value
        return TrainingState(
            parts["model"],
            parts["best"],
            parts["optimizer"],
            numbers["epoch"],
            numbers["batch"],
            numbers["examples"],
            numbers["loss"],
            tuple(numbers["validation_auc"]),
        )

    def delete(self) -> None:
        """After the model is registered."""
        filesystem, path = filesystem_of(self.uri)
        if filesystem.get_file_info(path).type != fs.FileType.NotFound:
            filesystem.delete_file(path)
