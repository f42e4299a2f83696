"""An embedding that waits in host memory: the rows of a micro-batch's tokens are looked up there, and sent.

A frozen embedding is read once a micro-batch, a row a token: 16 KiB of Llama 3 70B's 1.96 GiB. So only those rows come
to the device. The host gathers them in a buffer of its own, and they are copied on a CUDA stream of their own. Nothing
of a backward pass needs them.

The host needs the token ids for it. Who has made them there gives them along with the batch (HOST_IDS in
common.data.batches), and then nobody waits for the GPU. Without them they come back from the device, and the host waits
until it has computed all that was before: once a micro-batch, or a token of an answer, where it waits anyway.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.machine.copy_stream import CopyStream
from common.machine.host_memory import empty_on_host
from common.machine.shared_memory import fill_once_per_machine


class HostEmbedding(nn.Embedding):
    """The class of an embedding whose weight waits in host memory; use_host_embedding gives it to one.

    The weight is no parameter any more, so that nothing moves it to a device or sends it to other processes.
    """

    host_ids: Tensor | None = None  # of the next forward pass, where they are known
    copies: CopyStream | None = None  # to the device of the token ids
    gathered: Tensor | None = None  # the buffer: uint8, as large as that of the largest micro-batch so far

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """input: int64, token ids. Their rows, (*input.shape, hidden size), on the device of the ids."""
        known, self.host_ids = self.host_ids, None
        ids = (input.cpu() if known is None else known).flatten()
        rows = torch.empty((len(ids), self.embedding_dim), dtype=self.weight.dtype, device=input.device)
        if self.copies is None or self.copies.device != input.device:
            self.copies = CopyStream(input.device)
        self.copies.synchronize()  # the host may be ahead: the copy before this one still reads the buffer
        if self.gathered is None or self.gathered.nbytes < rows.nbytes:
            self.gathered = None  # before the larger one is taken
            self.gathered = empty_on_host(rows.nbytes, rows)
        gathered = self.gathered[: rows.nbytes].view(rows.dtype).view(rows.shape)
        torch.index_select(self.weight, 0, ids, out=gathered)
        self.copies.copy(rows, gathered)
        self.copies.wait()
        return rows.view(*input.shape, self.embedding_dim)


def has_host_embedding(model: PreTrainedModel | PeftModel) -> bool:
    return isinstance(model.get_input_embeddings(), HostEmbedding)


def give_host_ids(model: PreTrainedModel | PeftModel, host_ids: Any) -> None:
    """Tells an embedding in host memory the token ids of the forward pass that follows; None where they are not known.

    host_ids: int64, an array on the host with the ids of `input_ids`. Does nothing for any other embedding.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, HostEmbedding):
        embedding.host_ids = None if host_ids is None else torch.from_numpy(host_ids)


@torch.no_grad()
def use_host_embedding(model: PreTrainedModel | PeftModel) -> None:
    """Makes the model's embedding wait in host memory, page-locked where the model is on a GPU.

    The processes of a machine share it, and all of them must call this. Losses and gradients stay what they are, to the
    bit. Does nothing where it waits there already. Raises ValueError for an embedding that is the head too, or is
    trained, and MemoryError, or torch's RuntimeError, when there is no memory.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings().weight
    if isinstance(embedding, HostEmbedding):
        return
    weight = embedding.weight
    if weight is head or weight.requires_grad:
        raise ValueError(f"the embedding is {'the head too' if weight is head else 'trained'}: it stays on the device")

    def fill(block: Tensor) -> None:
        block.view(weight.dtype).view(weight.shape).copy_(weight)

    on_host = fill_once_per_machine(weight.nbytes, fill, head)
    del embedding.weight
    embedding.weight = on_host.view(weight.dtype).view(weight.shape)
    kind = type(embedding)  # Gemma's has a forward of its own, which scales what its parent class gives
    own = HostEmbedding if kind is nn.Embedding else type(f"Host{kind.__name__}", (kind, HostEmbedding), {})
    embedding.__class__ = own
