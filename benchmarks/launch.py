"""Times what the host takes to start the operators of a decoder layer: a layer whose compute is nothing.

    python -m benchmarks.launch             # on a CPU, with nothing else running

A GPU computes beside the host. It is idle where the host takes longer to start a layer's operators than the GPU to
compute them, so a plan counts a time for each (common.plan.speed). Here a layer of hidden size 64 reads 8 tokens, the
operators of common.kernels return empty tensors, and so what is timed is Python, PEFT's modules, autograd, and torch's
dispatcher with its allocator. Adapters are fp64 and the compute fp32, for the casts of fp32 adapters beside bf16: in
bf16 a CPU takes long for any matmul. Not in it is what the driver takes for a launch, and Triton's own launcher.

Results go to benchmarks/results/launch_<machine>.json.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.results_folder import installed_versions, result_path, write_result
from common.machine.device import Machine, this_machine
from common.model.activation_checkpointing import Policy, checkpoint_activations, decoder_layers
from common.model.held_adapters import held_adapters
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.plan.operators import OPERATORS_WITHOUT_TRAFFIC
from common.recipe import LoraSpec, ModelSpec

TOKENS, HIDDEN, LAYERS = 8, 64, 3
# By operator of common.kernels: a version that computes nothing.
EMPTY: dict[str, Callable[..., Any]] = {
    "rms_norm_forward": lambda x, *_: torch.empty_like(x),
    "rms_norm_backward": lambda grad, *_: torch.empty_like(grad),
    "rotate": lambda query, key, *_: (torch.empty_like(query), torch.empty_like(key)),
    "swiglu": lambda gate, *_: torch.empty_like(gate),
    "swiglu_backward_": lambda grad, *_: (torch.empty_like(grad), torch.empty_like(grad)),
    "nf4_dequantize": lambda packed, *rest: torch.empty(rest[-2], dtype=rest[-1]),
}


class Operators(TorchDispatchMode):
    """Counts as a plan does: what reads or writes memory, no views."""

    count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counts = operator.namespace != "prim" and not operator.is_view and operator not in OPERATORS_WITHOUT_TRAFFIC
        self.count += counts
        return operator(*args, **(kwargs or {}))


def small_model() -> Any:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    machine = Machine(torch.device("cpu"), torch.float32, "a benchmark", "CPU")
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        model = attach_lora(load_4bit(ModelSpec(folder), machine), LoraSpec(rank=16, alpha=32))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.double()
    use_lean_layers(model, "lean")
    return model.train()


def time_layer(model: Any, *, recomputes: bool, repeats: int) -> dict[str, dict[str, float]]:
    """Operators and microseconds, the median, of a layer's forward pass and of its backward pass."""
    checkpoint_activations(model, Policy(LAYERS, 0 if recomputes else LAYERS))
    layer = decoder_layers(model)[1]
    hidden = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    positions = torch.arange(TOKENS)[None]
    embeddings = model.get_base_model().model.rotary_emb(hidden, positions)

    def forward() -> Tensor:
        output: Tensor = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=embeddings)
        return output

    grad = torch.ones(1, TOKENS, HIDDEN)
    forward().backward(grad)  # makes what is held, and the gradients
    with Operators() as in_forward:
        output = forward()
    with Operators() as in_backward:
        output.backward(grad)
    times: list[tuple[float, float]] = []
    for _ in range(20 + repeats):
        began = time.perf_counter()
        output = forward()
        middle = time.perf_counter()
        output.backward(grad)
        times.append((middle - began, time.perf_counter() - middle))
    found = {}
    for index, (name, count) in enumerate((("forward", in_forward.count), ("backward", in_backward.count))):
        microseconds = 1e6 * sorted(pair[index] for pair in times[20:])[repeats // 2]
        found[name] = {
            "operators": count,
            "us": round(microseconds, 1),
            "us_an_operator": round(microseconds / count, 2),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--out", type=Path, help="folder of the .json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    library = torch.library.Library("common", "IMPL")
    for name, empty in EMPTY.items():
        library.impl(name, empty, "CPU")
    model = small_model()
    held = held_adapters(model)
    found = {}
    for held_copies in (False, True):
        for recomputes in (False, True):
            held.release()
            if held_copies:
                held.hold()
            name = f"{'recomputes' if recomputes else 'keeps'}{', adapters held' if held_copies else ''}"
            found[name] = time_layer(model, recomputes=recomputes, repeats=args.repeats)
            for part, values in found[name].items():
                print(f"{name:26} {part:9} {values['operators']:4} operators {values['us']:8,.1f} us", end="")
                print(f" {values['us_an_operator']:6.2f} us an operator")
    versions = installed_versions(("torch", "transformers", "peft", "bitsandbytes"))
    report = {"date": date.today().isoformat(), "machine": str(this_machine()), "versions": versions, "times": found}
    write_result(report, result_path("launch", args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
