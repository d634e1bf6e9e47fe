"""Metrics against scikit-learn; a planted taste; resuming after kill -9; several processes; divergence."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks.train import FEATURES, generated
from jobs.ctr.batch import Items, UserBatch
from jobs.ctr.dmqn import DMQN, DMQNShape
from jobs.ctr.embedding import ItemEmbedding
from jobs.ctr.metrics import Scores, auc, gauc, log_loss, measure
from jobs.ctr.training import Progress, Trained, TrainingDiverged, predict, train
from jobs.ctr.training_state import TrainingCheckpoint
from jobs.errors import SchemaError
from tokenizer.collectives import total, total_rows

ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 9)), min_size=2, max_size=60)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_auc_gauc_and_log_loss_are_those_of_scikit_learn(rows: list[tuple[int, int, int]]) -> None:
    user = np.array([u for u, _, _ in rows])
    label, score = np.array([y for _, y, _ in rows], np.float32), np.array([(s + 1) / 12 for _, _, s in rows])
    aucs = {
        u: (int((user == u).sum()), roc_auc_score(label[user == u], score[user == u]))
        for u in np.unique(user)
        if len(np.unique(label[user == u])) == 2
    }
    value, users = gauc(user, label, score)
    assert users == len(aucs)
    assert log_loss(label, score) == pytest.approx(sklearn_log_loss(label, score, labels=[0, 1]))
    if aucs:
        assert value == pytest.approx(sum(n * a for n, a in aucs.values()) / sum(n for n, _ in aucs.values()))
        assert auc(label, score) == pytest.approx(roc_auc_score(label, score))
    else:
        assert np.isnan(value)


def test_calibration_and_the_cold_slice() -> None:
    scores = Scores(
        label=np.tile(np.array([1, 0, 1, 0], np.float32), 20),
        score=np.tile([0.9, 0.3, 0.2, 0.6], 20),
        user=np.zeros(80, np.int64),
        shown=np.tile([9, 5, 4, 0], 20),
    )
    metrics = measure(scores)
    assert metrics.calibration == pytest.approx(0.5 / 0.5)
    assert (metrics.auc_cold, metrics.cold_impressions, metrics.cold_clicks) == (0.0, 40, 20)  # of the last two of four
    assert metrics.auc == pytest.approx(0.5)


@pytest.mark.parametrize(("clicks", "others"), [(20, 19), (19, 200), (0, 0)])
def test_an_auc_of_few_cold_impressions_is_undefined_but_they_are_counted(clicks: int, others: int) -> None:
    warm, cold = [1, 0] * 50, [1] * clicks + [0] * others
    label = np.array(warm + cold, np.float32)
    scores = Scores(label, label * 0.5, np.zeros(len(label), np.int64), np.array([5] * 100 + [4] * len(cold)))
    metrics = measure(scores)
    assert np.isnan(metrics.auc_cold)
    assert (metrics.auc, metrics.cold_impressions, metrics.cold_clicks) == (1.0, clicks + others, clicks)


def test_metrics_of_one_class_or_of_no_numbers_are_undefined() -> None:
    ones, score = np.ones(3, np.float32), np.array([0.1, 0.2, 0.3])
    assert np.isnan(gauc(np.array([0, 0, 1]), ones, score)[0])
    assert np.isnan(auc(np.array([0, 1, 1], np.float32), np.array([0.1, np.nan, 0.3])))


def planted(users: int, seed: int, *, tokens: bool = True) -> list[UserBatch]:
    """Users like one of 8 groups of 4,000 items, each rare; only the token tells the group of an item."""
    g = torch.Generator().manual_seed(seed)
    groups, each, length, batches = 8, 6, 12, []
    for _ in range(users // 16):
        taste = torch.randint(groups, (16,), generator=g)

        def items(group: Tensor) -> Items:
            rows = 1 + group + groups * torch.randint(500, group.shape, generator=g)
            return Items(rows, 1 + group[..., None], torch.full((*group.shape, 1), float(tokens)))

        user = torch.arange(16).repeat_interleave(each)
        liked = torch.rand(16 * each, generator=g) < 0.5
        group = torch.where(liked, taste[user], torch.randint(groups, (16 * each,), generator=g))
        click = torch.where(group == taste[user], 0.8, 0.1)
        base = generated(16, length, each)
        batches.append(
            replace(
                base,
                behaviours=items(taste[:, None].expand(-1, length + each - 1)),
                candidates=items(group),
                label=(torch.rand(16 * each, generator=g) < click).float(),
            )
        )
    return batches


def small(width: int = 8) -> DMQN:
    torch.manual_seed(0)
    shape = DMQNShape(features=FEATURES, width=width, interest_codebooks=2, codewords=6)
    return DMQN(ItemEmbedding(4001, 9, width), shape)


def test_a_planted_taste_is_learned_through_tokens_and_not_without() -> None:
    aucs = {}
    for tokens in (True, False):
        training, validation, test = (planted(n, seed, tokens=tokens) for n, seed in ((1600, 0), (320, 1), (320, 2)))
        trained = train(small(), lambda _, t=training: t, validation, epochs=4, learning_rate=5e-3)
        aucs[tokens] = measure(predict(trained.model, test)).auc
    assert aucs[True] > 0.75
    assert aucs[False] < 0.65


@pytest.mark.parametrize(("patience", "trained_before"), [(1, False), (3, False), (1, True)])
def test_the_best_epoch_is_kept_and_training_stops_after_it(patience: int, trained_before: bool) -> None:
    """The start of a model that was trained before counts as an epoch."""

    class Worsening(nn.Module):
        """Its prediction is right until it has trained for two epochs."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, batch: UserBatch) -> Tensor:
            if self.training:
                self.steps += 1
            sign = 1.0 if self.steps <= 2 else -1.0
            return sign * (batch.label - 0.5) + 0 * self.weight

    reports: list[Progress] = []
    batches = planted(16, 0)
    trained = train(
        Worsening(),
        lambda _: batches,
        batches,
        epochs=9,
        learning_rate=0.1,
        patience=patience,
        trained_before=trained_before,
        progress=reports.append,
    )
    assert trained.validation_auc == (1.0, 1.0, 0.0, 0.0)[: 1 + patience]  # none is better than the first: stop
    assert float(trained.model.steps) == (0 if trained_before else 1)
    assert tuple(report.validation_auc for report in reports) == trained.validation_auc
    assert ("at the start, validation AUC 1" if trained_before else "epoch 1, 96 examples") in str(reports[0])


def test_a_loss_that_is_no_number_ends_with_a_sentence() -> None:
    batches = planted(64, 0)
    broken = [*batches[:2], replace(batches[2], features=torch.full((96, FEATURES), float("nan")))]
    with pytest.raises(TrainingDiverged, match=r"learning_rate = 0.003 the loss is nan in epoch 1; expected a number"):
        train(small(), lambda _: broken, batches, epochs=1, learning_rate=3e-3)
    with pytest.raises(SchemaError, match="no examples"):
        train(small(), lambda _: [], batches, epochs=1, learning_rate=3e-3)


# ---- checkpoints ----

SLOW = 0.05  # seconds a batch of the process that is killed


def trained_on_planted(folder: Path, *, slow: bool = False) -> Trained:
    """What the killed and the whole run both do: shuffled epochs, dropout and Gumbel noise."""
    torch.set_num_threads(1)
    batches, validation = planted(320, 0), planted(160, 1)

    def of(epoch: int):  # type: ignore[no-untyped-def]
        for number in np.random.default_rng(epoch).permutation(len(batches)):
            time.sleep(SLOW * slow)
            yield batches[number]

    checkpoint = TrainingCheckpoint(str(folder / "state.safetensors"), "planted", every=3)
    return train(small(), of, validation, epochs=3, learning_rate=3e-3, checkpoint=checkpoint)


def save_trained(trained: Trained, file: Path) -> None:
    save_file({**trained.model.state_dict(), "auc": torch.tensor(trained.validation_auc)}, str(file))


CODE = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("work", sys.argv[1])
work = importlib.util.module_from_spec(spec)
sys.modules["work"] = work
spec.loader.exec_module(work)
folder = pathlib.Path(sys.argv[2])
work.save_trained(work.trained_on_planted(folder, slow=sys.argv[3] == "slow"), folder / "trained.safetensors")
"""


def start(folder: Path, pace: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CODE, __file__, str(folder), pace])


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 5])
def test_killed_and_run_again_gives_the_same_model_bit_for_bit(tmp_path: Path, after: int) -> None:
    """Killed after its `after`-th checkpoint, within the first or the second epoch."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process, state = start(killed, "slow"), killed / "state.safetensors"
    seen: set[int] = set()
    while len(seen) < after:
        assert process.poll() is None, "ended before it was killed"
        if state.exists():
            seen.add(state.stat().st_mtime_ns)
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "trained.safetensors").exists()
    whole.mkdir()
    save_trained(trained_on_planted(whole), whole / "trained.safetensors")
    save_trained(trained_on_planted(killed), killed / "trained.safetensors")
    expected, resumed = (load_file(str(folder / "trained.safetensors")) for folder in (whole, killed))
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_state_of_other_work_is_not_gone_on_from(tmp_path: Path) -> None:
    batches = planted(64, 0)
    for key, epochs in (("one", 1), ("two", 1)):
        checkpoint = TrainingCheckpoint(str(tmp_path / "state"), key, every=1)
        assert checkpoint.load() is None
        trained = train(small(), lambda _: batches, batches, epochs=epochs, learning_rate=1e-3, checkpoint=checkpoint)
        assert len(trained.validation_auc) == 1
    again = TrainingCheckpoint(str(tmp_path / "state"), "two").load()
    assert again is not None
    assert again.epoch == 1
    checkpoint.delete()
    assert checkpoint.load() is None


# ---- several processes ----

WORKER = """
import importlib.util, os, pathlib, sys
import torch
spec = importlib.util.spec_from_file_location("work", sys.argv[1])
work = importlib.util.module_from_spec(spec)
sys.modules["work"] = work
spec.loader.exec_module(work)
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
work.compare_sums_of_rows(rank)
trained = work.trained_without_noise(rank, world)
if rank == 0:
    work.save_trained(trained, pathlib.Path(sys.argv[2]))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def compare_sums_of_rows(rank: int) -> None:
    """In two processes: of which rows are sent, the sum is that of whole matrices to the bit."""
    g = torch.Generator().manual_seed(rank)
    for own_rows in ((30, 5), (0, 7), (0, 0)):
        own = torch.zeros(50, 3)
        rows = torch.randperm(50, generator=g)[: own_rows[rank]]
        own[rows] = torch.randn(len(rows), 3, generator=g)
        assert torch.equal(total_rows(own), total(own.clone())), own_rows


def trained_without_noise(rank: int, world: int) -> Trained:
    """Five steps a process and epoch; the last one has no batch left for the second of two processes."""
    batches, validation = planted(16 * 9, 0), planted(160, 1)

    class Logistic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = ItemEmbedding(4001, 9, 4)
            self.out = nn.Linear(4, 1)

        def forward(self, batch: UserBatch) -> Tensor:
            history = self.embed(batch.behaviours).mean(1)[batch.user]
            logits: Tensor = self.out(history * self.embed(batch.candidates) + history)[:, 0]
            return logits

    if world == 1:  # each step on what two processes have in it
        pairs = [batches[number : number + 2] for number in range(0, 9, 2)]
        batches = [pair[0] if len(pair) == 1 else joined(*pair) for pair in pairs]
        own = batches
    else:
        own, validation = batches[rank::world], validation[rank::world]
    return train(Logistic(), lambda _: own, validation, epochs=2, learning_rate=0.01)


def joined(a: UserBatch, b: UserBatch) -> UserBatch:
    def both(x: Items, y: Items) -> Items:
        return Items(*(torch.cat([getattr(x, name), getattr(y, name)]) for name in ("item", "tokens", "weights")))

    whole = {
        name: torch.cat([getattr(a, name), getattr(b, name)])
        for name in ("behaviour_time", "length", "first", "last", "time", "features", "label", "shown", "user_number")
    }
    user = torch.cat([a.user, b.user + len(a.length)])
    return UserBatch(
        behaviours=both(a.behaviours, b.behaviours), candidates=both(a.candidates, b.candidates), user=user, **whole
    )


def test_two_processes_are_one_with_batches_twice_as_large(tmp_path: Path) -> None:
    file = tmp_path / "two.safetensors"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, __file__, str(file)], env={**os.environ, **address, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    two, one = load_file(str(file)), trained_without_noise(0, 1)
    torch.testing.assert_close(two.pop("auc"), torch.tensor(one.validation_auc))
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
