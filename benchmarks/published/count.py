"""Counts one step of a published run on fake tensors, and says what was counted in a line of JSON.

    PYTHONPATH=<the folder of the row's packages> python -m benchmarks.published.count "<name of the row>"

benchmarks.published starts it, a process a row: the transformers and PEFT that it imports are the authors'.
"""

import gc
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from types import MethodType
from typing import Any

import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.published.rows import DATA_SHEETS, MODELS, ROWS, Row
from benchmarks.published.stack import (
    WORKSPACE_BYTES,
    MaskedDropout,
    OldLinear4bit,
    Scales,
    act_as_on_gpu,
    use_attention,
)
from common.plan.ledger import Ledger, round_up
from common.plan.speed import Speed, speed_of
from common.plan.step import KINDS, WEIGHTS, Step

BF16 = torch.bfloat16


def build_model(row: Row) -> Any:
    """The model on the meta device, with adapters, in training mode. Base weights are bf16."""
    name, values = MODELS[row.model]
    config = transformers.AutoConfig.for_model(name, **values)
    attention = use_attention(row.stack.attention, transformers)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, torch_dtype=BF16, attn_implementation=attention)
        if row.method == "qlora":
            _make_4bit(model, row)
    if row.method != "full":
        model.requires_grad_(False)
        model.is_loaded_in_4bit = row.method == "qlora"
        if row.stack.reentrant:
            model.enable_input_require_grads()
        targets = list(row.targets) if row.targets else None
        lora = LoraConfig(r=row.rank, lora_alpha=16, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    adapter_dtype = torch.float32 if row.stack.adapters_fp32 else BF16
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            dtype = adapter_dtype if "lora_" in name else parameter.dtype
            if row.norms_fp32 and "norm" in name:
                dtype = torch.float32
            parameter.data = parameter.data.to(dtype)
    _replace(model, nn.Dropout, lambda dropout: MaskedDropout(dropout.p))
    return model.train()


def _make_4bit(model: nn.Module, row: Row) -> None:
    def old_linear(linear: nn.Linear) -> OldLinear4bit:
        made = OldLinear4bit(linear.in_features, linear.out_features, linear.bias is not None, BF16, quant_type="nf4")
        made.keeps_input = row.stack.keeps_inputs
        return made

    head = model.get_output_embeddings()  # type: ignore[operator]
    _replace(model, nn.Linear, lambda linear: linear if linear is head else old_linear(linear))


def _replace(model: nn.Module, kind: type[nn.Module], make: Any) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))


def materialise(model: nn.Module, row: Row) -> list[Tensor]:
    """Replaces every meta tensor by a fake one; parameters that are tied stay one. Returns the scales of 4-bit weights.

    Call it under the FakeTensorMode.
    """
    made: dict[int, nn.Parameter] = {}
    scales: list[Tensor] = []
    nested_code = torch.empty(256) if row.stack.double_quant else None
    dtype = torch.float32 if row.stack.dequantizes_to_fp32 else BF16
    moved_to_bf16 = not row.stack.trains  # the notebook's model.to("cuda", torch.bfloat16), buffers too
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                floating = moved_to_bf16 and buffer.is_floating_point()
                module._buffers[name] = torch.empty(buffer.shape, dtype=BF16 if floating else buffer.dtype)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if isinstance(module, OldLinear4bit) and name == "weight":
                packed = torch.empty((module.in_features * module.out_features // 2, 1), dtype=torch.uint8)
                module._parameters[name] = nn.Parameter(packed, requires_grad=False)
                module.scales = Scales.of(module, dtype, nested_code)
                scales += module.scales.tensors()
                continue
            if id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
    return scales


def count(row: Row) -> tuple[Step, int]:
    """The step, with what stands before it as its resident memory; and the bytes that stand between two steps.

    cuBLAS's workspaces are not in it.
    """
    act_as_on_gpu()
    model = build_model(row)
    with FakeTensorMode(allow_non_fake_inputs=True):
        scales = materialise(model, row)
        # Dropout's random state is kept by a real run; a fake one has none.
        options = {"use_reentrant": row.stack.reentrant, "preserve_rng_state": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        if row.autocast:  # accelerate's prepare_model
            model.forward = MethodType(torch.autocast("cpu", BF16)(model.forward.__func__), model)
            model.forward = MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=True)
        if row.stack.trains:
            _allocate_states(optimizer, trained)
        states = [value for state in optimizer.state.values() for value in state.values()]
        # The three that the trainer sends: input_ids, attention_mask, labels.
        batch = [torch.empty((row.rows, row.tokens), dtype=torch.int64) for _ in range(3 if row.stack.trains else 1)]
        on_gpu = [*model.parameters(), *model.buffers(), *scales, *(s for s in states if s.dim()), *batch]
        resident = _bytes_of(on_gpu)
        ledger = Ledger([*on_gpu, *states])  # a state without dimensions, the number of steps, is on the host
        gc.collect()
        model.get_output_embeddings().register_forward_pre_hook(lambda *_: ledger.begin_segment("head and loss"))
        with ledger:
            if row.stack.warm_up_tokens:
                ledger.begin_segment("warm-up")
                with torch.no_grad():
                    model(torch.empty((1, row.stack.warm_up_tokens), dtype=torch.int64))
                gc.collect()
                ledger.begin_segment("after the warm-up")
            _run(model, batch, row, ledger, optimizer, trained)
    segments = list(ledger.segments())
    while row.stack.warm_up_tokens and segments[0].name != "after the warm-up":
        resident += segments.pop(0).net
    nothing = dict.fromkeys(KINDS, 0)
    return Step(nothing | {WEIGHTS: resident}, nothing, 0, tuple(segments)), resident


def _run(
    model: Any, batch: list[Tensor], row: Row, ledger: Ledger, optimizer: torch.optim.Optimizer, trained: list[Any]
) -> None:
    ledger.begin_segment("forward")
    if row.stack.loss == "mean of logits":
        outputs = model(batch[0])
        loss = outputs.logits.mean()
        ledger.begin_segment("backward")
        loss.backward()
        del outputs, loss
        return
    # Versions that know it divide the loss by the number of tokens.
    extra = {} if transformers.__version__ < "4.46" else {"num_items_in_batch": row.rows * row.tokens}
    loss = model(input_ids=batch[0], labels=batch[2], **extra)["loss"]
    ledger.begin_segment("backward")
    loss.backward()
    del loss
    ledger.begin_segment("optimizer")
    if row.stack.clips:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _allocate_states(optimizer: torch.optim.Optimizer, trained: list[Any]) -> None:
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(round_up(size) for size in storages.values())


def peak_segment(step: Step) -> str:
    """The name of the segment with the worst moment."""
    now, highest, name = sum(step.resident.values()), 0, ""
    for segment in step.segments:
        if now + segment.rise > highest:
            highest, name = now + segment.rise, segment.name
        now += segment.net
    return name


def seconds_on(step: Step, gpu: str) -> dict[str, float | None]:
    """The step's time by the model of common.plan.speed: with the GPU's data sheet, and with its own speeds."""
    own = speed_of(gpu)
    flops, bandwidth = DATA_SHEETS[gpu]
    return {
        "data_sheet": step.seconds(Speed(gpu, flops, bandwidth)),
        "own": step.seconds(own) if own.name in gpu else None,  # else it is another GPU's
    }


def main(name: str) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    started = time.perf_counter()
    (row,) = (row for row in ROWS if row.name == name)
    for pin in row.stack.packages:
        package, pinned = pin.split("==")
        assert version(package) == pinned, f"{package} is {version(package)}, not {pinned}"
    step, resident = count(row)
    result = {
        "predicted_bytes": step.peak() + WORKSPACE_BYTES,
        "predicted_rest_bytes": resident + WORKSPACE_BYTES,
        "peak_in": peak_segment(step),
        "launches": sum(segment.work.launches for segment in step.segments),
        "predicted_seconds": {gpu: seconds_on(step, gpu) for gpu in row.tokens_per_s},
        "counted_in_s": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
