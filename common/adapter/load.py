"""Loads a trained adapter onto its base, and the tokenizer that goes with it."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.adapter.answer_layout import layout_on
from common.adapter.find import TrainedAdapter
from common.adapter.trained_base import find_trained_base
from common.machine.device import this_machine, warn_of_unused_gpu
from common.machine.layout import Layout
from common.model.adapter_weights import read_adapter_weights
from common.model.generation_config import GENERATION_CONFIG, read_generation_config
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit, load_tokenizer
from common.model.pad_embedding import mend_pad_embedding
from common.recipe import ModelSpec, UserError
from common.tokens.stop_ids import stop_ids


def trained_tokenizer(adapter: TrainedAdapter) -> PreTrainedTokenizerFast:
    """Loads the tokenizer that the run saved, with its chat template; the base's where there is none in the folder."""
    spec = adapter.recipe.model
    if not (adapter.folder / "tokenizer.json").exists():
        return load_tokenizer(spec)
    tokenizer = load_tokenizer(ModelSpec(str(adapter.folder)), spec)
    if not tokenizer.chat_template and spec.chat_template is not None:  # one from elsewhere, and the recipe's template
        tokenizer = load_tokenizer(ModelSpec(str(adapter.folder), chat_template=spec.chat_template), spec)
    return tokenizer


def load_trained(
    adapter: TrainedAdapter, tokenizer: PreTrainedTokenizerFast | None = None, layout: Layout | None = None
) -> PeftModel:
    """Loads the 4-bit base and puts the adapter on it. In eval mode; inside `disable_adapter()` it is the base alone.

    Its generation config is the run's, else the base's, and stops at the end of the template's turns.
    tokenizer: of trained_tokenizer, where it is loaded already. layout: None lets weights wait in host memory where the
    card has no room for all of them.

    Raises UserError as find_trained_base, load_4bit and attach_adapter.
    """
    if adapter.recipe.model.weights == "pretrained":
        find_trained_base(adapter)
    tokenizer = tokenizer or trained_tokenizer(adapter)
    warn_of_unused_gpu("computing")
    machine = this_machine()
    model = load_4bit(adapter.recipe.model, machine, layout=layout or layout_on(adapter.recipe, machine))
    mend_pad_embedding(model, tokenizer)
    peft_model = attach_adapter(model, adapter, model.device)
    if (adapter.folder / GENERATION_CONFIG).exists():
        model.generation_config = read_generation_config(adapter.folder, str(adapter.folder))
    known = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = stop_ids(tokenizer, known)
    use_lean_layers(peft_model, adapter.recipe.train.kernels)
    return peft_model.eval()


def attach_adapter(base: PreTrainedModel, adapter: TrainedAdapter, device: torch.device) -> PeftModel:
    """Puts the adapter on the base: its weights in fp32, on `device`, frozen. The base may be on the meta device.

    Raises UserError as read_adapter_weights, and when PEFT cannot put it on the base.
    """
    try:
        model = PeftModel(base, adapter.config, low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise UserError(f"the adapter in {adapter.folder} does not fit {adapter.recipe.model.name}: {error}") from error
    state = read_adapter_weights(model, adapter.folder, adapter.recipe.model.name, device)
    # PEFT's set_peft_model_state_dict would move the adapter to the base's device, which may be meta.
    model.load_state_dict(state, strict=False, assign=True)  # not strict: the base's weights are not among them
    model.requires_grad_(False)
    return model
