"""Several processes, one GPU each: torchrun --nproc_per_node=4 train.py ...

Each computes its rows of every batch; gradients are added up. Each holds a copy of the model (DistributedDataParallel) or,
with --shard=True, a part of every parameter and of the optimizer (FSDP2, Zhao et al., arXiv 2304.11277).
"""
import os
from types import SimpleNamespace

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from attention import RMSNorm
from model import LanguageModel

rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))     # set by torchrun
local_rank = int(os.environ.get('LOCAL_RANK', 0))


def sharded(config, seed, device, dtype, compile):
    """-> LanguageModel whose parameters are DTensors over all processes; no process ever holds more than a layer whole.

    A layer's matrices are gathered when it runs, in the dtype of its products; gradients are added up in float32. What
    computes in float32 in one process does so here: gains, router, embedding (and with it the stream of the residuals).
    """
    mesh = init_device_mesh(device.type, (world_size,))
    with torch.device('meta'):
        model = LanguageModel(config, seed=None)
    narrow = MixedPrecisionPolicy(getattr(torch, dtype), torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        if compile:
            layer.compile()
        wide = [m for name, m in layer.named_modules() if isinstance(m, RMSNorm) or name.endswith('router')]
        fully_shard(wide, mesh=mesh, reshard_after_forward=False)
        fully_shard(layer, mesh=mesh, mp_policy=narrow)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    for buffer in model.buffers():                          # the routers' selection bias
        buffer.zero_()
    for name, p in model.named_parameters():                # one at a time, the same numbers as in one process
        whole = torch.empty(p.shape)
        LanguageModel.init_weights(SimpleNamespace(named_parameters=lambda: [(name, whole)]), seed)
        part = distribute_tensor(whole.to(device), mesh, p.placements, src_data_rank=None)
        p.to_local().detach().copy_(part.to_local())
    return model


def sync_gradients(model, now):
    """Whether the next backward adds up gradients over the processes: only the last one of an update does."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif world_size > 1:
        model.set_requires_gradient_sync(now)
