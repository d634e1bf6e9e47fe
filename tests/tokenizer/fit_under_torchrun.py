"""torchrun --nproc-per-node N fit_under_torchrun.py FOLDER: a fit by N plain processes, each on its share of the
blocks.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from data import topics

from tokenizer import FIT_BLOCK, fit_rqgmm, save_codebook

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
blocks = torch.from_numpy(topics(4 * FIT_BLOCK, 8, groups=30, spread=0.4)).split(FIT_BLOCK)
own = list(blocks[rank * len(blocks) // world : (rank + 1) * len(blocks) // world])
fitted = fit_rqgmm(own, levels=2, components=8, seed=1)
if rank == 0:
    save_codebook(Path(sys.argv[1]), fitted.rqgmm, {})
dist.destroy_process_group()
