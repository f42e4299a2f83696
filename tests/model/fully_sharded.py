"""Steps of a small model whose layers lie cut over processes, under every policy; tests/model/test_sharding.py runs it.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.model.fully_sharded FOLDER lean|stock 6 float32

Prints a line of JSON for each of the first 6 policies, or for long rows in tiles: 0 sharded layers, -1 the whole model
in each process (DistributedDataParallel). It has the losses of STEPS steps; of the last micro-batch and optimizer
step the bytes that torch's allocator gave out beyond what was there, at the worst moment, and how often a layer was
gathered.
"""

import json
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile

from common.data.batches import collate
from common.machine.collectives import all_reduce_sum, init_distributed, shut_down_distributed
from common.machine.device import Machine
from common.machine.layout import Layout
from common.machine.processes import rank, world_size
from common.model.activation_checkpointing import Policy, checkpoint_activations
from common.model.attention import PACKED_ATTENTION
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.model.optimizer import build_optimizer
from common.model.sharding import clip_grad_norm, shard_layers
from common.plan.forecast import full_batch
from common.recipe import Kernels, LoraSpec, ModelSpec, TrainSpec
from common.tokens.labels import IGNORED
from tests import flash_on_cpu  # noqa: F401  (gives the CPU flash attention's operators)
from tests.allocations import peak_in, watched_allocations

LAYERS, TOKENS, STEPS = 6, 768, 2
POLICIES = {
    "every layer": Policy(LAYERS),
    "some layers": Policy(LAYERS, 2),
    "offload": Policy(LAYERS, offload=True),
    "keep attention": Policy(LAYERS, keep_attention=True),
    "none": Policy(LAYERS, LAYERS),
    "all at once": Policy(LAYERS, 2, keep_attention=True, offload=True),
}
LONG_ROWS = Policy(LAYERS, offload=True, tile=256, by_head=True)
LORA = LoraSpec(8, 16)


def main(folder: str, kernels: Kernels, policies: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    init_distributed()
    count = world_size()
    layout = Layout(count, sharded=count > 1 and policies >= 0)
    machine = Machine(torch.device("cpu"), dtype, "a test", "a CPU")
    for name, policy in list(POLICIES.items())[:policies] if policies > 0 else [("long rows", LONG_ROWS)]:
        model = attach_lora(load_4bit(ModelSpec(folder), machine, layout=layout), LORA)
        use_lean_layers(model, kernels)
        if policy.tile:
            model.set_attn_implementation(PACKED_ATTENTION)
        checkpoint_activations(model, policy)
        shard_layers(model, layout)
        optimizer = build_optimizer(model.train(), TrainSpec(TOKENS, 2, 4e-3))
        computing = model if policies >= 0 else DistributedDataParallel(model, broadcast_buffers=False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        generator, losses = torch.Generator().manual_seed(0), []
        for step in range(STEPS):
            rows = torch.randint(10, 900, (6, TOKENS), generator=generator)
            own = rows.chunk(count)[rank()]
            batches = [batch_of(row, packed=policy.tile > 0) for row in own]  # a micro-batch each
            scale = len(rows) * (TOKENS - 1)
            total = sum(backward(computing, batch, scale, dtype) for batch in batches[:-1])
            with watched_allocations() if step == STEPS - 1 else nullcontext() as profiler:
                total += backward(computing, batches[-1], scale, dtype)
                (clip_grad_norm if policies >= 0 else torch.nn.utils.clip_grad_norm_)(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses += all_reduce_sum([total])
        report(name, losses, profiler)
    shut_down_distributed()


def batch_of(row: Tensor, *, packed: bool) -> dict[str, Any]:
    if packed:
        labels = [IGNORED, *row[1:].tolist()]
        packed_row = {"input_ids": row.tolist(), "labels": labels, "seq_lengths": [TOKENS // 4] * 4}
        return collate([packed_row], 0, padding_free=True)
    batch = full_batch(TOKENS, TOKENS, padding_free=False) | {"input_ids": row[None], "labels": row[None]}
    batch["trained_positions"] = torch.arange(TOKENS - 1)
    batch["position_ids"] = torch.arange(TOKENS // 4).repeat(1, 4)  # several examples: attention needs a mask
    return batch


def backward(model: nn.Module, batch: dict[str, Any], tokens: int, dtype: torch.dtype) -> float:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):  # as on a GPU: fp32 adapters, 16-bit compute
        loss = model(**batch, num_items_in_batch=tokens).loss
    (loss * world_size()).backward()  # FSDP takes the mean of the processes' gradients
    return loss.item()


def report(policy: str, losses: list[float], profiler: profile) -> None:
    events = profiler.profiler.kineto_results.events()
    gathers = sum(event.name().startswith("FSDP::all_gather (") for event in events)
    peak = peak_in(profiler)
    print(json.dumps({"policy": policy, "losses": losses, "peak": peak, "gathers": gathers}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), getattr(torch, sys.argv[4]))  # type: ignore[arg-type]
