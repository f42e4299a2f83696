"""Loads the base model in 4 bit (or 16) and its tokenizer: from the hub, a folder, or random weights of a config."""

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from common import REPOSITORY
from common.machine.device import Machine, this_machine
from common.machine.layout import ONE_PROCESS, Layout
from common.machine.shared_memory import read_once_per_machine
from common.model.activation_checkpointing import decoder_layers
from common.model.attention import attention_implementation
from common.model.base_weights import BaseWeights, make_linears_4bit, random_state
from common.model.files import load_config, model_folder
from common.model.loss import fuse_head_and_loss
from common.process_state import quiet_transformers
from common.recipe import ModelSpec, UserError

TINY = REPOSITORY / "models" / "tiny"
# Tokens that exist in our models' vocabularies and that no chat template uses, in the order of preference.
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|endoftext|>", "[PAD]", "<pad>", "<unk>")


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerFast:
    """The model's tokenizer, with its chat template and with a pad token that is no end of turn.

    With random weights nothing is downloaded: unless the model is a local folder, the tokenizer of models/tiny stands
    in. Raises UserError when the files cannot be had or read, and when no token can serve for padding.
    """
    if spec.weights == "random" and not Path(spec.name).is_dir():
        folder = TINY
        print("random weights: the tokenizer of models/tiny stands in for the model's own")
    else:
        folder = model_folder(spec, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{spec.name} has no tokenizer that can be read: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{spec.name} has no tokenizer.json; convert its tokenizer to the fast format first")
    if spec.chat_template is not None:
        path = Path(spec.chat_template)
        if not path.is_file():
            raise UserError(f"ModelSpec.chat_template: there is no file {path}")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    _set_pad_token(tokenizer, spec.name)
    return tokenizer


def _set_pad_token(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Padding must not be the end of a turn: it is masked, and the model would never learn to stop."""
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    template = tokenizer.chat_template or ""
    for token in PAD_TOKENS:
        if token in tokenizer.get_vocab() and token != tokenizer.eos_token and token not in template:
            tokenizer.pad_token = token
            return
    raise UserError(f"{name} has no token to pad with; tried {', '.join(PAD_TOKENS)}")


def load_4bit(spec: ModelSpec, machine: Machine | None = None, *, layout: Layout = ONE_PROCESS) -> PreTrainedModel:
    """The base model on the machine's device: linear layers in NF4 (`spec.bits=4`), all else in the compute dtype.

    Weights are read and quantised one tensor at a time, so host memory stays near one tensor above the result. With a
    layout that shards them the decoder layers are still hollow: common.model.sharding.shard_layers fills them.
    Raises UserError when the weights are missing, damaged, incomplete, or quantised in another way.
    """
    machine = machine or this_machine()
    quiet_transformers()
    config, folder = load_config(spec), None
    if spec.weights == "pretrained":
        folder = model_folder(spec, weights=True)
        config = load_config(spec, folder)  # what came with the weights, not the copy that serves for planning
    if machine.dtype == torch.float16 and config.model_type.startswith("qwen"):
        print(f"warning: {machine}; Qwen models overflow in fp16, the loss may become NaN")
    if layout.sharded:
        _is_4bit_checkpoint(config, spec)
        return _hollow_model(spec, config, folder, machine)
    arguments: dict[str, Any] = {
        "config": config,
        "dtype": machine.dtype,
        "device_map": {"": machine.device},
        "attn_implementation": attention_implementation(machine),
        "output_loading_info": True,
    }
    if spec.bits == 4 and not _is_4bit_checkpoint(config, spec):
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=machine.dtype,
        )
    if folder is None:
        state = random_state(config, machine)
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(None, state_dict=state, **arguments)
    else:
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, **arguments
            )
        except torch.OutOfMemoryError as error:
            raise UserError(f"{spec.name} does not fit the memory that is free on {machine.name}") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{spec.name} cannot be loaded: {_first_line(error)}") from error
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise UserError(f"{spec.name} is incomplete: {len(info['missing_keys'])} tensors are missing, first {first}")
    _prepare_4bit_modules(model, spec, machine)
    return _finished(model, spec)


def _finished(model: PreTrainedModel, spec: ModelSpec) -> PreTrainedModel:
    fuse_head_and_loss(model)
    # Where it came from, not where the cache is: this is written into the adapter's config.
    model.config._name_or_path = model.name_or_path = spec.name
    return model


def _hollow_model(spec: ModelSpec, config: PretrainedConfig, folder: Path | None, machine: Machine) -> PreTrainedModel:
    """The model without the weights of its decoder layers, and `model.base_weights` to fill them from.

    In their place stand tensors of their shapes that take no memory, on the CPU, where PEFT makes its adapters.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=machine.dtype, attn_implementation=attention_implementation(machine)
        )
        if spec.bits == 4:
            make_linears_4bit(model, machine.dtype)
    model.is_loaded_in_4bit = spec.bits == 4
    model.base_weights = weights = BaseWeights(spec, config, folder, machine)
    inside = {parameter for layer in decoder_layers(model) for parameter in layer.parameters()}
    for name, parameter in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        if parameter in inside:
            hollow = torch.empty((), dtype=parameter.dtype).expand(parameter.shape)
            # PEFT asks a 4-bit weight how it was quantised.
            made = Params4bit(hollow, quant_type="nf4") if isinstance(parameter, Params4bit) else nn.Parameter(hollow)
        else:
            (value,) = read_once_per_machine(machine.device, weights.in_16_bit, name, parameter.shape)
            made = nn.Parameter(value)
        setattr(model.get_submodule(owner), key, made.requires_grad_(False))
    model.tie_weights()
    model.base_model.rotary_emb = type(model.base_model.rotary_emb)(config=config).to(machine.device)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu, module.compute_type_is_set = False, True  # as _prepare_4bit_modules
    if folder is not None and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return _finished(model.eval(), spec)


def _prepare_4bit_modules(model: PreTrainedModel, spec: ModelSpec, machine: Machine) -> None:
    """Raises UserError when a weight has another shape than the config says: transformers checks 16-bit ones only."""
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        stored, wanted = tuple(module.weight.quant_state.shape), (module.out_features, module.in_features)
        if stored != wanted:
            raise UserError(f"{spec.name} does not fit its config.json: {name} is {stored}, the config says {wanted}")
        module.compute_dtype = machine.dtype
        # bitsandbytes 0.50 repacks the weights for inference in eval mode on a CPU with AVX512-BF16, rounds their
        # scales to bf16 on the way, and the repacked form has no backward.
        module.support_avx512bf16_for_cpu = False


def _is_4bit_checkpoint(config: PretrainedConfig, spec: ModelSpec) -> bool:
    """Whether the weights are stored in bitsandbytes' 4-bit form. Raises UserError for any other quantisation."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return False
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if stored.get("quant_method") != "bitsandbytes" or not stored.get("load_in_4bit"):
        kind = stored.get("quant_method", "an unknown method")
        raise UserError(f"{spec.name} is quantised with {kind}; take the original, or a bitsandbytes 4-bit checkpoint")
    return True


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
