"""How the weights of a checkpoint are quantized: what its config says, and what its files hold.

Before a download a config.json is all that is known, so a plan goes by it. Once the files are there they decide:
`config_as_stored` makes the config say what they hold, and everything that builds a model reads it from there.
"""

import re
from typing import Any

from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from common.model.safetensors_files import SafetensorsFolder
from common.recipe import ALL_LINEAR, ModelSpec, UserError

QUANT_TYPE = "nf4"
HEAD = "lm_head"  # transformers' name for it in every architecture of ours
# The tensor with the settings of a 4-bit weight is named after the weight, this, and the quant type.
SETTINGS = ".quant_state.bitsandbytes__"


def stored_quantization(config: PretrainedConfig) -> BitsAndBytesConfig | None:
    """How the weights are stored in 4 bits, as the config says; None where they are stored in 16 or 32."""
    given = getattr(config, "quantization_config", None)
    return BitsAndBytesConfig.from_dict(given) if isinstance(given, dict) else given


def refuse_other_quantization(spec: ModelSpec, config: PretrainedConfig) -> None:
    """Raises UserError for a quantized checkpoint, unless it is in bitsandbytes' NF4, with or without double
    quantization, its head has 16 bits, and the recipe asks for 4."""
    values: Any = getattr(config, "quantization_config", None)
    if values is None:
        return
    if not isinstance(values, dict) or not values.get("load_in_4bit"):
        method = values.get("quant_method", "an unknown method") if isinstance(values, dict) else "an unknown method"
        bits = " in 8 bits" if isinstance(values, dict) and values.get("load_in_8bit") else ""
        raise UserError(
            f"{spec.name} is quantised with {method}{bits}; take the original, or a bitsandbytes 4-bit checkpoint"
        )
    try:
        quantization = BitsAndBytesConfig.from_dict(values)
        skipped = quantization.llm_int8_skip_modules
        head_is_4bit = skipped is not None and should_convert_module(HEAD, skipped)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise UserError(
            f"the quantization_config in the config.json of {spec.name} cannot be read: {error}; take the original"
        ) from error
    _refuse_other_4bit(spec, quantization.bnb_4bit_quant_type, head_is_4bit=head_is_4bit)
    _refuse_16_bits(spec)


def _refuse_16_bits(spec: ModelSpec) -> None:
    if spec.bits != 4:
        raise UserError(f"ModelSpec.bits is {spec.bits}, and {spec.name} is stored in 4; take bits=4, or the original")


def _refuse_other_4bit(spec: ModelSpec, quant_type: str, *, head_is_4bit: bool) -> None:
    if quant_type != QUANT_TYPE:
        raise UserError(
            f"{spec.name} is quantised in {quant_type}; take an {QUANT_TYPE} checkpoint, or the original, which is "
            "quantised to NF4 as it loads"
        )
    if head_is_4bit:
        raise UserError(
            f"{spec.name} has its head ({HEAD}) in 4 bits, and the loss reads it in 16; take the original, or a "
            f"checkpoint with {HEAD} in its llm_int8_skip_modules"
        )


def config_as_stored(spec: ModelSpec, config: PretrainedConfig, stored: SafetensorsFolder) -> None:
    """Makes the config's quantization_config say which layers the files hold in 4 bits, and in which form.

    Where it said otherwise, prints that. Raises UserError for what `refuse_other_quantization` refuses.
    """
    packed = {name.partition(SETTINGS)[0]: name.partition(SETTINGS)[2] for name in stored.entries if SETTINGS in name}
    for name, quant_type in packed.items():
        _refuse_other_4bit(spec, quant_type, head_is_4bit=name == f"{HEAD}.weight")
    linears = [name for name in stored.entries if name.endswith(tuple(f".{linear}.weight" for linear in ALL_LINEAR))]
    in_16_bits = [name for name in linears if name not in packed]
    said = stored_quantization(config)
    double_quant = bool(packed) and all(f"{name}.nested_absmax" in stored.entries for name in packed)
    if difference := _difference(said, list(packed), in_16_bits, double_quant=double_quant):
        print(
            f"warning: {spec.name} is not as its config.json says: {difference}. What its files hold is what loads; a "
            "plan, which reads config.json alone, counts other weights"
        )
    if not packed:
        if said is not None:
            del config.quantization_config
        return
    _refuse_16_bits(spec)
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=QUANT_TYPE,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=stored.entries[next(iter(packed))].dtype,
        llm_int8_skip_modules=[HEAD, *(name.removesuffix(".weight") for name in in_16_bits)],
    ).to_dict()


def _difference(
    said: BitsAndBytesConfig | None, in_4_bits: list[str], in_16_bits: list[str], *, double_quant: bool
) -> str | None:
    """What the files hold and the config does not say, in words; None where it says everything."""
    patterns = None if said is None else said.llm_int8_skip_modules
    for names, bits in ((in_4_bits, 4), (in_16_bits, 16)):
        for name in names:
            says_4 = said is not None and should_convert_module(name.removesuffix(".weight"), patterns)
            if says_4 != (bits == 4):
                return f"{name} is stored in {bits} bits"
    if said is not None and in_4_bits and said.bnb_4bit_use_double_quant != double_quant:
        return f"the scales are stored {'with' if double_quant else 'without'} double quantization"
    return None
