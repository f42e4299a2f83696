"""Out of memory, a run goes on with less: it recomputes more layers, takes smaller tiles, splits its micro-batches.

A backward pass that ran out of memory has already added to the gradients, and nothing tells its share from the rest.
So the gradients are zeroed and the whole optimizer step is computed again: no step is lost, and the rows of an
optimizer step stay what the recipe says.
"""

import gc
from collections.abc import Callable
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor

from common.data.batches import Batch, halve
from common.machine.device import available_ram
from common.machine.layout import RING_SLOTS
from common.machine.out_of_memory import out_of_memory, without_frames
from common.machine.processes import world_size
from common.model.activation_checkpointing import Policy, checkpoint_activations, decoder_layers
from common.model.lean_layers import can_tile, is_lean
from common.model.weight_streaming import stream_weights, streamed_tensors, weight_ring

FIRST_TILE = 4_096  # tokens: where a plan has none
# Tokens: in the time in which a matmul reads its weight, an H100 computes 240 rows (common/plan/speed.py). A smaller
# tile would save little more, because what is left is not of the tile.
SMALLEST_TILE = 512


def add_up(results: list[Tensor]) -> Tensor:
    return torch.stack(results).sum(0)


class StepDown:
    """Computes micro-batches, with less memory after each time that it did not suffice.

    policy: the activation checkpointing in effect. taken: every step down so far, in words. before_retry is called
    before micro-batches are computed again.
    """

    def __init__(self, model: PeftModel, policy: Policy, before_retry: Callable[[], None] = lambda: None) -> None:
        self.model, self.policy, self.before_retry = model, policy, before_retry
        self.halvings = 0  # how often each micro-batch is cut in half
        self.host_is_full = False  # nothing of the GPU can wait in host memory
        self.taken: list[str] = []

    def compute(
        self,
        compute_part: Callable[[Batch], Tensor],
        micro_batches: list[Batch],
        step: int,
        *,
        backward: bool,
        join: Callable[[list[Tensor]], Tensor] = add_up,
    ) -> Tensor:
        """Computes the last of the micro-batches, and returns the results of its parts, joined: their sum.

        compute_part: returns a tensor, of one shape for all parts where they are added up. micro_batches: those of the
        optimizer step so far; after a step down all of them are computed again. step: the number of the optimizer step,
        to tell the user. backward: whether compute_part saves activations, so that recomputing more layers helps.
        Raises the error (`out_of_memory`) when nothing is left to try, and on several processes at once, where the
        others would wait for this one.
        """
        pending = micro_batches[-1:]
        while True:
            try:
                for batch in pending:
                    results = [compute_part(part) for part in self.split(batch)]
                return join(results)
            except Exception as error:
                if (memory := out_of_memory(error)) is None:
                    raise
                failure = error
            if world_size() > 1:
                raise without_frames(failure)
            has_gpu = torch.cuda.is_available()
            if has_gpu:
                # Copies may be under way between the host and tensors that die with the frames of the error. And a GPU
                # that has failed in another way says so here.
                torch.cuda.synchronize()
            without_frames(failure)
            of_host = memory == "host" and has_gpu
            less = self._step_down(micro_batches[-1], backward, of_host=of_host)
            if less is None:
                raise failure
            self.taken.append(f"step {step}: {less}")
            which = "host memory" if of_host else "memory"
            print(f"out of {which} in step {step}; going on with {less}; rows per step stay the same")
            self.model.zero_grad()
            self.before_retry()
            gc.collect()
            if has_gpu:
                torch.cuda.empty_cache()
                torch.accelerator.empty_host_cache()  # pinned blocks of other sizes than the next ones
            pending = micro_batches

    def split(self, batch: Batch) -> list[Batch]:
        """The parts in which a micro-batch is computed."""
        parts = [batch]
        for _ in range(self.halvings):
            parts = [half for part in parts for half in halve(part)]
        return parts

    def _step_down(self, batch: Batch, backward: bool, *, of_host: bool) -> str | None:
        """Changes what saves memory at the least cost in time, and says what; None when nothing is left.

        First half as many layers keep their activations, then layers in tiles go by head, take smaller tiles, and
        compute queries, keys and values again, then micro-batches are halved, then the inputs of the recomputing layers
        move to host memory, then all layers compute in tiles, where they can, and at last the weights of all layers
        move to host memory. of_host: it is the memory of the host beside a GPU. What waits there are those inputs:
        halved micro-batches have half of them, and then they stay on the GPU.
        """
        halvings = self.halvings
        if backward and self.policy.kept and not of_host:
            self.policy = replace(self.policy, kept=self.policy.kept // 2)
        elif not of_host and (leaner := self._leaner_tiles()):
            self.policy = leaner
        elif any(len(halve(part)) == 2 for part in self.split(batch)):
            self.halvings += 1
        elif backward and of_host and self.policy.offload:
            self.policy, self.host_is_full = replace(self.policy, offload=False), True
        elif backward and not of_host and not self.policy.offload and not self.host_is_full:
            self.policy = replace(self.policy, offload=True)
        elif not of_host and not self.policy.tile and is_lean(self.model) and can_tile(self.model):
            self.policy = replace(self.policy, tile=FIRST_TILE)
        elif not of_host and not self.host_is_full and (layers := self._layers_that_can_stream()):
            checkpoint_activations(self.model, self.policy)
            stream_weights(self.model, layers)
            return f"the weights of all {layers} layers in host memory"
        else:
            return None
        checkpoint_activations(self.model, self.policy)  # drops what the step that failed left in host memory
        return f"each micro-batch in {2**self.halvings} parts" if self.halvings > halvings else str(self.policy)

    def _layers_that_can_stream(self) -> int:
        """How many layers' weights can move to host memory: all, or none where that saves nothing or has no room."""
        layers, available = decoder_layers(self.model), available_ram()
        if weight_ring(self.model) is not None or len(layers) <= RING_SLOTS:
            return 0
        needed = sum(streamed_tensors(layer)[1] for layer in layers)
        return len(layers) if available is None or available > needed else 0

    def _leaner_tiles(self) -> Policy | None:
        """The policy with the next lever for layers in tiles; None where there are none, or nothing is left."""
        if self.policy.tile and not self.policy.by_head:
            return replace(self.policy, by_head=True)
        if self.policy.tile > SMALLEST_TILE:
            return replace(self.policy, tile=self.policy.tile // 2)
        if self.policy.by_head and not self.policy.qkv_again:
            return replace(self.policy, qkv_again=True)
        return None
