"""What the libraries' trainers and accelerate would do to a model that the recipe has prepared, and must not."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from common.model.activation_checkpointing import TRAINER_FLAG
from common.model.sharding import clip_grad_norm
from common.recipe import UserError


def refuse_second_sharding(sharded: bool, arguments: Any) -> None:
    """Raises UserError where the trainer, or accelerate, would checkpoint or shard once more what the recipe did.

    With the trainer's flag beside FSDP's own checkpointing each layer is gathered once more (transformers issue 30404).
    """
    if sharded and getattr(arguments, TRAINER_FLAG):
        raise UserError(
            f"{TRAINER_FLAG}=True in the trainer's arguments, and the plan checkpoints sharded layers already: each "
            "would be gathered once more. Leave the trainer's off; TrainSpec.checkpointing says which layers recompute"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise UserError(
            "accelerate is told to shard the model (ACCELERATE_USE_FSDP), which the recipe's plan does where it is "
            "needed: start it with torchrun, or with accelerate launch without --use_fsdp"
        )


def leave_sharding_alone(accelerator: Accelerator) -> None:
    """Replaces two methods of this accelerator, which would treat a sharded model as a whole one.

    prepare_model would wrap it in DistributedDataParallel; "for evaluation" it adds autocast alone. clip_grad_norm_
    would not take shards on the card and in host memory together.
    """
    stock_prepare = accelerator.prepare_model

    def prepare_model(model: PeftModel, *_: Any, **__: Any) -> PeftModel:
        prepared: PeftModel = stock_prepare(model, device_placement=False, evaluation_mode=True)
        return prepared

    def clip_shards(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        accelerator.unscale_gradients()
        return clip_grad_norm(parameters, max_norm)

    accelerator.prepare_model = prepare_model
    accelerator.clip_grad_norm_ = clip_shards


@contextmanager
def keep_adapters_fp32(model: PeftModel) -> Iterator[None]:
    """Takes back a cast of the adapters in the block.

    TRL casts those of a 4-bit model to bf16, where small updates round away and a resumed run differs.
    """
    adapters = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in adapters:
            parameter.data = adapters[name]


@contextmanager
def leave_training_mode(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """In the block model.train() returns at once where all modules train already; else it is torch's own.

    transformers' training_step calls it for every micro-batch, and it sets the mode of each of them anew: 12 ms for the
    2,665 modules of Llama 3 8B with adapters, in which a GPU that has computed all it was given is idle. To look at
    their modes takes a hundredth of that. modules: all those of the model.
    """
    if all(module.training for module in modules):
        with patch.object(model, "train", lambda: model):
            yield
    else:
        yield
