"""One big run: full-data training in several processes, one for each GPU.

    torchrun --nproc_per_node 2 -m foster_lib.distributed ml-100k

Every process draws the same batches and takes each k-th sequence of them; PyTorch's
DistributedDataParallel adds up the gradients while they are computed. The part of process r in the mean
over a batch's T targets is T_r / T of its own mean. Dropout masks are those of the whole batch, so
training differs from that of one process by rounding alone, and for its key what is recorded is the same:
`make reproduce-table2`, `python -m foster_lib distill` … find the full-data model trained.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from foster_lib.batches import Batch
from foster_lib.cli import changed_settings
from foster_lib.errors import FosterError, complain
from foster_lib.evaluation import rank_queries, recommender_scorer
from foster_lib.execution import resolve_device
from foster_lib.paths import new_folder, shown
from foster_lib.recipes import full_data, save_best, save_checkpoint
from foster_lib.runs import Run, load_catalogue, make_task, trained, trajectory_folder
from foster_lib.sasrec import Dropout, SASRec
from foster_lib.splits import Queries
from foster_lib.task import Task
from foster_lib.training import RealSequences, TrainLog, TrainSettings, train


class Team:
    """This process among `size`, and of the batch at hand the number of sequences and the rows that are its own."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.batch, self.rows = 0, slice(0)

    @classmethod
    def here(cls) -> Team:
        return cls(dist.get_rank(), dist.get_world_size())

    def part(self, batch: Batch) -> tuple[Batch, float]:
        """Every `size`-th sequence of a batch, and the fraction of the batch's targets that they hold.

        Where there are fewer sequences than processes, some take the first one, which then counts nothing.
        """
        self.batch = len(batch.inputs)
        self.rows = slice(self.rank, None, self.size) if self.rank < self.batch else slice(0, 1)
        own = torch.zeros(self.batch, dtype=torch.bool, device=batch.mask.device)
        own[self.rows] = True
        targets = batch.targets[own[batch.mask.nonzero()[:, 0]]]
        share = len(targets) / len(batch.targets) if self.rank < self.batch else 0.0
        return replace(batch, inputs=batch.inputs[own], mask=batch.mask[own], targets=targets), share


class SharedDropout(Dropout):
    """Draws the masks of the whole batch, as one process would, and uses those of its own rows."""

    def __init__(self, dropout: Dropout, team: Team):
        super().__init__(dropout.p, dropout.generator)
        self.team = team

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty(self.team.batch, *x.shape[1:]).bernoulli_(1 - self.p, generator=self.generator)
        return x * keep[self.team.rows].div_(1 - self.p)


def share_dropout(model: SASRec, team: Team) -> SASRec:
    """The model with `SharedDropout` in all places of `Dropout`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Dropout):
                setattr(module, name, SharedDropout(child, team))
    return model


class OwnLoss(nn.Module):
    """The loss on a process's own part of a batch: a module, because DDP watches a module's gradients."""

    def __init__(self, model: SASRec, data: RealSequences):
        super().__init__()
        self.model, self.data = model, data

    def forward(self, batch: Batch) -> Tensor:
        return self.data.loss(self.model, batch)


class SharedSequences:
    """`RealSequences` for `training.train` in each of several processes, with the loss of the whole batch.

    Parameters
    ----------
    model : SASRec
        Process 0's weights at the start are everyone's.
    """

    def __init__(self, data: RealSequences, model: SASRec, team: Team):
        self.data, self.team = data, team
        self.own_loss = DistributedDataParallel(
            OwnLoss(share_dropout(model, team), data),
            broadcast_buffers=False,  # they are text embeddings, which do not change
            find_unused_parameters=any(p.requires_grad for p in model.catalogue.parameters()),  # e.g. BERT's pooler
        )

    def batches(self, generator: np.random.Generator) -> Iterable[Batch]:
        return self.data.batches(generator)

    def loss(self, model: SASRec, batch: Batch) -> Tensor:
        """The batch's mean loss in value; in gradient the own part, `size` times, as DDP takes the mean."""
        own, share = self.team.part(batch)
        loss = self.own_loss(own) * (share * self.team.size)
        whole = loss.detach() / self.team.size
        dist.all_reduce(whole)
        return loss + (whole - loss.detach())


def shared_validation(task: Task, team: Team, model: SASRec) -> float:
    """`Task.validate`, each process ranking its own queries; the same figure in all of them."""
    queries, mine = task.validation_sample, slice(team.rank, None, team.size)
    own = Queries(queries.users[mine], queries.histories[mine], queries.targets[mine])
    total = 0.0
    if len(own):
        total = rank_queries(recommender_scorer(model), own, task.n_items).per_user("ndcg@10").sum()
    figure = torch.tensor(float(total), dtype=torch.float64 if task.device == "cpu" else torch.float32).to(task.device)
    dist.all_reduce(figure)
    return float(figure) / len(queries)


def train_full_shared(task: Task, settings: TrainSettings, seed: int, folder: Path, progress: str = "") -> TrainLog:
    """`recipes.train_full` by all processes of the group that is set up; process 0 records it in `folder`."""
    team, model = Team.here(), task.new_model(seed)
    with new_folder(folder) if team.rank == 0 else nullcontext() as working:

        def record(epoch: int, model: SASRec) -> None:
            if working:
                save_checkpoint(model, epoch, working)

        log = train(
            model,
            SharedSequences(full_data(task, settings), model, team),
            settings,
            seed=seed,
            validate=lambda model: shared_validation(task, team, model),
            on_epoch=record,
            device=task.device,
            progress=progress if working else "",
        )
        if working:
            save_best(model, log, task, working, processes=team.size, losses=log.losses)
    dist.barrier()  # until it is written
    return log


def join(device: str) -> str:
    """Join the processes that torchrun has started (or be the only one); the device of this one."""
    device = resolve_device(device)
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    patience = timedelta(hours=12)  # others wait while one embeds the catalogue; torchrun notices who died
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=patience, **alone)
    return device


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc_per_node 2 -m foster_lib.distributed",
        description="Train the full-data model of a data set in several processes, one for each GPU.",
        epilog="example: torchrun --nproc_per_node 4 -m foster_lib.distributed data/shop --set full.batch_size=1024",
    )
    parser.add_argument("data", help="a data set, as for `python -m foster_lib train`")
    parser.add_argument("--profile", default="cpu", help="settings, default: cpu, the published ones")
    parser.add_argument("--split", default="", help="leave-one-out or temporal, default: the profile's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, full.epochs=12; repeat"
    )
    parser.add_argument("--fresh", action="store_true", help="train again what is trained")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        device = join(options.device)
        run = Run(changed_settings(options.data, options.profile, options.split, options.set), "full", options.seed)
        folder, first = trajectory_folder(run), dist.get_rank() == 0
        done = [trained(run) and not options.fresh]
        dist.broadcast_object_list(done)  # process 0 decides for all, whatever they see of its disk
        if done[0]:
            print(f"{shown(folder)}: trained already (again: --fresh)" * first, end="\n" * first)
            return 0
        if os.environ.get("LOCAL_RANK", "0") == "0":
            load_catalogue(run.settings.dataset, run.settings.encoder, device)  # embed once on each machine
        dist.barrier()
        log = train_full_shared(
            make_task(run, device), run.settings.full, run.seed, folder, f"{options.data} full data"
        )
        if first:
            best = log.validation[log.best_epoch]
            print(f"{shown(folder)}: {len(log.losses)} epochs in {log.seconds:.0f} s, validation NDCG@10 {best:.4f}")
    except FosterError as error:
        return complain(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
