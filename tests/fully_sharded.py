"""A few steps of the small model, its 4-bit weights sharded over processes by FSDP2; tests/test_processes.py runs it.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.fully_sharded lean 0
"""

import os
import sys

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from common.activation_checkpointing import Policy, checkpoint_activations, decoder_layers
from common.adapters import attach_lora
from common.loss import fuse_head_and_loss
from common.modules import fuse_layers
from common.recipe import LoraSpec
from tests.conftest import TINY


def main(kernels: str, kept: int) -> None:
    """Prints the loss of each of five steps of four rows."""
    torch.set_num_threads(1)
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,  # FSDP shards what has one dtype
    )
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, quantization_config=quantisation)
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # as common.loading
    fuse_head_and_loss(model)
    model = attach_lora(model, LoraSpec(rank=8, alpha=16))
    fuse_layers(model, kernels)
    layers = decoder_layers(model)
    checkpoint_activations(model, Policy(len(layers), kept))
    if processes > 1:
        distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (processes,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        rows = torch.randint(10, 900, (4, 64), generator=generator)
        own = rows[rank::processes]
        loss = model(input_ids=own, labels=own, num_items_in_batch=rows[:, 1:].numel()).loss
        (loss * processes).backward()  # FSDP takes the mean of the processes' gradients
        total = loss.detach().clone()
        if processes > 1:
            distributed.all_reduce(total)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"loss {total.item():.5f}", flush=True)
    if processes > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
