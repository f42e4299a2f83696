"""Loads the base model in 4 bit (or 16) and its tokenizer: from the hub, a folder, or random weights of a config."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from common import REPOSITORY
from common.machine.device import GIB, Machine, this_machine
from common.machine.disk import format_bytes
from common.machine.layout import ONE_PROCESS, Layout, spread_layers
from common.machine.out_of_memory import out_of_memory
from common.machine.paths import local_path
from common.machine.processes import local_world_size
from common.machine.slow_work import report_slow_work
from common.model.activation_checkpointing import decoder_layers
from common.model.architectures import ARCHITECTURES
from common.model.attention import attention_implementation
from common.model.base_hash import read_base_record
from common.model.chat_template import choose_chat_template
from common.model.config import load_config, refuse_other_shape
from common.model.download import model_folder
from common.model.generation_config import read_generation_config
from common.model.hollow_model import build_hollow_model, fill_layer, take_layer_weights
from common.model.integrity import refuse_other_names
from common.model.loss import fuse_head_and_loss
from common.model.nf4 import keep_packed_form, quantization_config
from common.model.quantization import config_as_stored, stored_quantization
from common.model.rope_scaling import keep_frequencies
from common.model.safetensors_files import SafetensorsFolder
from common.model.tensor_source import WeightsOrigin, random_state
from common.model.weight_files import first_file, weight_files
from common.model.weight_streaming import WeightRing, move_to_host
from common.process_state import quiet_transformers
from common.recipe import ModelSpec, UserError
from common.tokens.vocabulary import describe_beyond, limit_vocabulary, tokens_beyond

TINY = REPOSITORY / "models" / "tiny"
MIN_ANNOUNCED_BYTES = 1 << 30  # a smaller model loads within a few seconds
# Tokens that exist in our models' vocabularies and that no chat template uses, in the order of preference.
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|endoftext|>", "[PAD]", "<pad>", "<unk>")


def load_tokenizer(spec: ModelSpec, base: ModelSpec | None = None) -> PreTrainedTokenizerFast:
    """The model's tokenizer, with its chat template and with a pad token that is no end of turn.

    With random weights nothing is downloaded: unless the model is a local folder, the tokenizer of models/tiny stands
    in. `base` is the model where `spec` names a folder that has a tokenizer alone. Raises UserError when the files
    cannot be had or read, as choose_chat_template, when no token can serve for padding, and when the model has no
    embedding for BOS or EOS.
    Other tokens without an embedding are known to what tokenises with it (common.tokens.vocabulary).
    """
    if spec.weights == "random" and not local_path(spec.name).is_dir():
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
    choose_chat_template(tokenizer, spec)
    stands_alone = base is None and spec.weights == "pretrained"
    limit_vocabulary(tokenizer, load_config(base or spec, folder if stands_alone else None).vocab_size)
    _refuse_ends_beyond(tokenizer, spec.name)
    _set_pad_token(tokenizer, spec.name)
    return tokenizer


def _refuse_ends_beyond(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Raises UserError when the model has no embedding for BOS or EOS, which begin and end texts."""
    beyond = tokens_beyond(tokenizer)
    for kind, index in (("BOS", tokenizer.bos_token_id), ("EOS", tokenizer.eos_token_id)):
        if index in beyond:
            raise UserError(
                f"the {kind} token of {name} is {describe_beyond(tokenizer, index)}: take the tokenizer that belongs "
                "to the model"
            )


def _set_pad_token(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Keeps a pad token that is no end of turn and that the model has an embedding for, else takes one of PAD_TOKENS.

    Padding is masked. If it were the end of a turn, the model would never learn to stop.
    """
    beyond, vocabulary = tokens_beyond(tokenizer), tokenizer.get_vocab()
    passed_over = tokenizer.pad_token_id if tokenizer.pad_token_id in beyond else None
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token and passed_over is None:
        return
    template = tokenizer.chat_template or ""
    for token in PAD_TOKENS:
        if token == tokenizer.eos_token or token in template or vocabulary.get(token, -1) in {-1, *beyond}:
            continue
        if passed_over is not None:
            print(f"the pad token is {describe_beyond(tokenizer, passed_over)}: {token} pads instead")
        tokenizer.pad_token = token
        return
    raise UserError(f"{name} has no token to pad with; tried {', '.join(PAD_TOKENS)}")


def load_4bit(spec: ModelSpec, machine: Machine | None = None, *, layout: Layout = ONE_PROCESS) -> PreTrainedModel:
    """The base model on the machine's device: linear layers in NF4 (`spec.bits=4`), all else in the compute dtype.

    Weights are read and quantized one tensor at a time, so host memory stays near one tensor above the result. With a
    layout whose weights stream, they go layer by layer to where they wait (common.model.weight_streaming). With one
    that shards, the decoder layers have no weights yet (common.model.hollow_model): `train`, or an answer before
    it, reads and shards them layer by layer when the adapters are attached (common.model.sharding).
    Raises UserError when the weights are missing, damaged, incomplete, or quantized in another way.
    """
    machine = machine or this_machine()
    config, weights = _find_weights(spec, machine)
    if machine.dtype == torch.float16 and ARCHITECTURES[config.model_type].overflows_in_fp16:
        print(f"warning: {machine}; {config.model_type} models overflow in fp16, the loss may become NaN")
    stored_in_4bit = isinstance(weights, Path) and stored_quantization(config) is not None
    quantizes = spec.bits == 4 and not stored_in_4bit
    record = read_base_record(weights) if isinstance(weights, Path) else None
    generation = read_generation_config(weights if isinstance(weights, Path) else None, spec.name, config)
    files, size = _count_files_and_bytes(weights)
    quiet_transformers(also_on_terminal=size < MIN_ANNOUNCED_BYTES)
    announce_loading(spec, files, size, quantizes=quantizes)
    if layout.sharded:
        model = build_hollow_model(spec, config, weights, machine, layout)
    elif layout.streamed or layout.embedding_on_host:
        with _memory_in_words(spec, machine):
            model = load_streaming_model(spec, config, weights, machine, layout)
    else:
        with _show_loading(spec):
            model = load_whole_model(spec, config, weights, machine, generation, quantizes=quantizes)
    model.generation_config = generation
    fuse_head_and_loss(model)
    keep_frequencies(model)
    model.base_record = record
    model.scaled_rope = spec.rope_scaling  # which attach_lora writes down with the adapter
    # The model's name on the hub, not its folder in the cache: PEFT writes it into the adapter's config.
    model.config._name_or_path = model.name_or_path = spec.name
    return model


def _find_weights(spec: ModelSpec, machine: Machine) -> tuple[PretrainedConfig, WeightsOrigin]:
    """The config, and where the weights come from; downloads what is missing."""
    if spec.weights == "random":
        config = load_config(spec)
        return config, random_state(config, machine)
    load_config(spec)  # refuses another architecture or quantization before gigabytes are downloaded
    folder = model_folder(spec, weights=True)
    config = load_config(spec, folder)  # the config that came with the weights may differ from the shipped copy
    config_as_stored(spec, config, SafetensorsFolder(folder))
    return config, folder


def _count_files_and_bytes(weights: WeightsOrigin) -> tuple[int, int]:
    if isinstance(weights, Path):
        sizes = [(weights / file).stat().st_size for file in weight_files(weights)]
        return len(sizes), sum(sizes)
    return 0, sum(tensor.shape.numel() * tensor.dtype.itemsize for tensor in weights.values())


def load_whole_model(
    spec: ModelSpec,
    config: PretrainedConfig,
    weights: WeightsOrigin,
    machine: Machine,
    generation: GenerationConfig,
    *,
    quantizes: bool,
) -> PreTrainedModel:
    """The model as transformers' from_pretrained loads it. quantizes: to NF4, from 16 or 32 bits.

    Raises UserError when the weights do not fit the card, cannot be read, are incomplete, or do not fit the config.
    """
    arguments: dict[str, Any] = {
        "config": config,
        "dtype": machine.dtype,
        "device_map": {"": machine.device},
        "attn_implementation": attention_implementation(machine, config),
        "output_loading_info": True,
        "generation_config": generation,  # transformers would read the file itself, whatever it holds
    }
    if quantizes:
        arguments["quantization_config"] = quantization_config(config, machine.dtype)
        config.quantization_config = None  # of a 4-bit checkpoint whose weights are random, and not quantized yet
    if isinstance(weights, dict):
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(None, state_dict=weights, **arguments)
    else:
        config.transformers_weights = first_file(weights)
        try:
            with _memory_in_words(spec, machine):
                model, info = AutoModelForCausalLM.from_pretrained(
                    weights, use_safetensors=True, local_files_only=True, trust_remote_code=False, **arguments
                )
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            raise UserError(f"{spec.name} cannot be loaded: {_first_line(error)}") from error
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise UserError(f"{spec.name} is incomplete: {len(info['missing_keys'])} tensors are missing, first {first}")
    if isinstance(weights, Path):
        refuse_other_names(spec, weights, (name for name, _ in model.named_parameters()))
    _prepare_4bit_model(model, spec, machine)
    return model


@contextmanager
def _memory_in_words(spec: ModelSpec, machine: Machine) -> Iterator[None]:
    """Raises UserError where the block runs out of memory."""
    try:
        yield
    except Exception as error:
        if (memory := out_of_memory(error)) is None:
            raise
        where = machine.name if memory == "GPU" else "the host"
        raise UserError(f"{spec.name} does not fit the memory that is free on {where}") from error


def load_streaming_model(
    spec: ModelSpec, config: PretrainedConfig, weights: WeightsOrigin, machine: Machine, layout: Layout
) -> PreTrainedModel:
    """The model with the weights of layout.streamed layers in host memory, read a layer at a time to their place.

    So is the embedding, where the layout says so. The card has at most what stays there and a tensor, then the ring;
    host memory what waits there and a layer, or the embedding once more.
    Raises UserError as TensorSource and fill_layer.
    """
    model = build_hollow_model(spec, config, weights, machine, layout)
    source, layers = take_layer_weights(model), decoder_layers(model)
    names, head = {module: name for name, module in model.named_modules()}, model.get_output_embeddings().weight
    chosen = [layers[index] for index in spread_layers(layout.streamed, len(layers))]
    blocks = []
    with report_slow_work("reading", len(layers), "layers") as work:
        for layer in layers:
            fill_layer(layer, names[layer], source, whole=True)
            if layer in chosen:
                blocks.append(move_to_host(layer, head))
            work.done += 1
    if blocks:
        WeightRing(chosen, blocks, machine.device)
    there = [*blocks, *[model.get_input_embeddings().weight] * layout.embedding_on_host]
    host = sum(tensor.nbytes for tensor in there) / GIB
    of_layers = [f"those of {len(chosen)} of {len(layers)} layers"] * bool(blocks)
    waits = " and ".join([*of_layers, *["the embedding"] * layout.embedding_on_host])
    shared = f", once for the {local_world_size()} processes of this machine" if there[0].is_shared() else ""
    print(f"weights: {waits} {'wait' if blocks else 'waits'} in host memory, {host:.2f} GiB{shared}")
    return model


def announce_loading(spec: ModelSpec, files: int, size: int, *, quantizes: bool) -> None:
    """Prints what is loaded, when that takes a while. files: 0 for random weights. size: bytes before quantization."""
    if size < MIN_ANNOUNCED_BYTES:
        return
    origin = {0: "random weights", 1: "1 file"}.get(files, f"{files} files")
    then = f", quantized to NF4 as they are {'read' if files else 'drawn'}" if quantizes else ""
    print(f"loading {spec.name}: {origin}, {format_bytes(size)}{then}", flush=True)


def _show_loading(spec: ModelSpec) -> AbstractContextManager[object]:
    """Shows that from_pretrained works: a status line; on a terminal transformers has a bar of its own."""
    return nullcontext() if sys.stderr.isatty() else report_slow_work(f"loading {spec.name}")


def _prepare_4bit_model(model: PreTrainedModel, spec: ModelSpec, machine: Machine) -> None:
    """Sets what a 4-bit checkpoint may have otherwise: the dtype of the compute, and of all that is not 4-bit.

    transformers leaves both as they are stored, and checks the shapes of 16-bit weights only. Raises UserError when a
    4-bit weight has another shape than the config says.
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            shape = torch.Size((module.out_features, module.in_features))
            refuse_other_shape(spec, name, module.weight.quant_state.shape, shape)
            module.compute_dtype = module.weight.quant_state.dtype = machine.dtype
            keep_packed_form(module)
    for parameter in model.parameters():
        if not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.to(machine.dtype)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
