"""An embedding in host memory gives the same bits, on the poisoned clock, and never lies on the device."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.data.batches import HOST_IDS
from common.machine import shared_memory
from common.machine.copy_stream import CopyStream
from common.machine.layout import Layout
from common.model.activation_checkpointing import Policy, finish_copies
from common.model.host_embedding import HostEmbedding, has_host_embedding, use_host_embedding
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.model.weight_streaming import stream_weights, weight_ring
from common.recipe import ModelSpec, UserError
from tests.conftest import ARCHITECTURES, FP32
from tests.model.test_weight_streaming import (
    LAYERS,
    LORA,
    POLICIES,
    SIZES,
    adapted,
    assert_same_bits,
    copy_without_waiting,
    gradients_of_two_passes,
    held_out_loss,
    ids_of,
    train_step,
)
from tests.poisoned_clock import PoisonedClock


@pytest.fixture(scope="module")
def folders(small_model):
    return {name: small_model(name, num_hidden_layers=LAYERS, tie_word_embeddings=False) for name in ARCHITECTURES}


def on_clock(model, policy: Policy, on_host: int = 0) -> dict[str, Tensor]:
    """What train_step finds with the embedding, and the weights of so many layers, in host memory."""
    with PoisonedClock():
        stream_weights(model, on_host)
        use_host_embedding(model)
        found = train_step(model, policy)
        found |= {f"second {name}": value for name, value in train_step(model, policy).items()}
        if on_host:
            weight_ring(model).finish()
        finish_copies(model)
    return found


def on_device(model, policy: Policy) -> dict[str, Tensor]:
    found = train_step(model, policy)
    return found | {f"second {name}": value for name, value in found.items()}


@pytest.mark.parametrize(
    ("architecture", "kernels", "policy", "on_host"),
    [
        *((name, "lean", "some layers", 0) for name in ARCHITECTURES),
        ("llama", "stock", "none", 0),
        ("gemma3_text", "stock", "every layer", LAYERS),
        ("llama", "lean", "every layer", LAYERS),
        ("qwen3", "lean", "all at once", LAYERS),
    ],
)
def test_losses_and_gradients_are_the_same_bits_whenever_the_copies_happen(
    folders, architecture, kernels, policy, on_host
):
    model = adapted(folders[architecture], kernels)
    expected = on_device(model, POLICIES[policy])
    assert_same_bits(on_clock(model, POLICIES[policy], on_host), expected)
    assert has_host_embedding(model)


def test_two_forward_passes_before_their_backward_passes_are_right_too(folders):
    model = adapted(folders["llama"])
    expected = gradients_of_two_passes(model, Policy(LAYERS))
    with PoisonedClock():
        use_host_embedding(model)
        assert_same_bits(gradients_of_two_passes(model, Policy(LAYERS)), expected)


def test_ids_that_the_host_knows_are_taken_once_and_no_gpu_is_asked_for_them(folders):
    """Where they are known the tensor of ids is not read: here it holds others."""
    model = adapted(folders["qwen2"]).eval()
    ids, others = ids_of(2, 20), ids_of(2, 20) + 50
    expected = held_out_loss(model, {"input_ids": ids, "labels": ids})
    use_host_embedding(model)
    with torch.no_grad():
        found = model(input_ids=others, labels=ids, **{HOST_IDS: ids.numpy()}).loss
        assert torch.equal(found, expected)
        assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)
        model.get_input_embeddings().host_ids = others  # of a pass that ended before its embedding
        assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=others, **{HOST_IDS: ids.numpy()}).logits)


def test_a_model_on_its_device_drops_the_ids_that_the_host_knows(folders):
    model = adapted(folders["qwen2"]).eval()
    ids = ids_of(2, 20)
    with torch.no_grad():
        found = model(input_ids=ids, labels=ids, **{HOST_IDS: ids.numpy()}).loss
    assert torch.equal(found, held_out_loss(model, {"input_ids": ids, "labels": ids}))


def test_answers_are_the_same(folders):
    model = adapted(folders["mistral"]).eval()
    prompt = {"input_ids": ids_of(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    expected = model.generate(**prompt, **options)
    with PoisonedClock():
        use_host_embedding(model)
        assert torch.equal(model.generate(**prompt, **options), expected)


def test_a_copy_that_waits_for_nothing_is_noticed(folders, monkeypatch):
    model = adapted(folders["llama"])
    monkeypatch.setattr(CopyStream, "copy", copy_without_waiting)
    assert not on_clock(model, POLICIES["none"])["loss 0"].isfinite()


def test_rows_that_nobody_waits_for_are_noticed(folders, monkeypatch):
    model = adapted(folders["llama"])
    monkeypatch.setattr(CopyStream, "wait", lambda _: None)
    with pytest.raises(AssertionError, match="memory was freed while a copy into it was under way"):
        on_clock(model, POLICIES["none"])


def test_a_buffer_that_the_host_fills_again_too_early_is_noticed(folders, monkeypatch):
    model = adapted(folders["llama"])
    monkeypatch.setattr(CopyStream, "synchronize", lambda _: None)
    with pytest.raises(AssertionError, match="the host reads or changes host memory"):
        on_clock(model, POLICIES["none"])


def test_the_buffer_is_as_large_as_the_largest_micro_batch_and_is_kept(folders):
    model = adapted(folders["llama"])
    use_host_embedding(model)
    train_step(model, POLICIES["none"])
    embedding = model.get_input_embeddings()
    most = max(rows * tokens for rows, tokens in SIZES)
    assert embedding.gathered.nbytes == most * embedding.weight[0].nbytes
    kept = embedding.gathered
    train_step(model, POLICIES["none"])
    assert embedding.gathered is kept


def test_the_weight_is_no_parameter_so_nothing_moves_it_or_sends_it(folders):
    model = adapted(folders["llama"])
    before = {name for name, _ in model.named_parameters()}
    weight = model.get_input_embeddings().weight.clone()
    use_host_embedding(model)
    use_host_embedding(model)  # does nothing
    embedding = model.get_input_embeddings()
    assert before - {name for name, _ in model.named_parameters()} == {"base_model.model.model.embed_tokens.weight"}
    assert torch.equal(embedding.weight, weight)
    at = embedding.weight.data_ptr()
    model.to("cpu:0")
    assert embedding.weight.data_ptr() == at and embedding.weight.device == torch.device("cpu")


@pytest.mark.parametrize("kind", ["tied", "trained"])
def test_an_embedding_that_cannot_move_is_refused(folders, small_model, kind):
    folder = small_model("llama", tie_word_embeddings=True) if kind == "tied" else folders["llama"]
    model = load_4bit(ModelSpec(str(folder)), FP32)
    model.get_input_embeddings().weight.requires_grad_(kind == "trained")
    with pytest.raises(ValueError, match="it stays on the device"):
        use_host_embedding(model)
    assert type(model.get_input_embeddings()) is nn.Embedding


class Largest(TorchDispatchMode):
    """The shapes of all that is made on a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.shapes = device, set[torch.Size]()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        outputs = operator(*args, **(kwargs or {}))
        self.shapes |= {leaf.shape for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and self.has(leaf)}
        return outputs

    def has(self, tensor: Tensor) -> bool:
        return tensor.device == self.device


@pytest.mark.parametrize("on_host", [0, LAYERS])
@pytest.mark.parametrize("embedding_on_host", [False, True])
def test_it_is_loaded_straight_to_host_memory(small_model, on_host, embedding_on_host):
    """A CPU with a number stands for the card: tensors are moved to it as to one, and the host's have no number."""
    card = torch.device("cpu:0")
    folder = small_model("gemma3_text", num_hidden_layers=LAYERS, tie_word_embeddings=False, vocab_size=777)
    layout = Layout(on_host=on_host, embedding_on_host=embedding_on_host)
    with Largest(card) as made:
        model = load_4bit(ModelSpec(str(folder)), replace(FP32, device=card), layout=layout)
    assert has_host_embedding(model) == embedding_on_host
    whole = load_4bit(ModelSpec(str(folder)), FP32)
    assert torch.equal(model.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    if on_host or embedding_on_host:  # else transformers loads it
        of_embedding = whole.get_input_embeddings().weight.shape
        assert (of_embedding in made.shapes) != embedding_on_host or of_embedding == whole.lm_head.weight.shape


@pytest.mark.parametrize("on_host", [0, LAYERS])
@pytest.mark.parametrize("architecture", ["gemma3_text", "llama"])
def test_a_model_that_is_loaded_to_its_place_is_the_same(folders, architecture, on_host):
    spec, layout = ModelSpec(str(folders[architecture])), Layout(on_host=on_host, embedding_on_host=True)
    found = []
    for place in (Layout(), layout):
        model = attach_lora(load_4bit(spec, FP32, layout=place), LORA, seed=3)
        use_lean_layers(model, "lean")
        found.append(train_step(model, POLICIES["some layers"]))
    assert isinstance(model.get_input_embeddings(), HostEmbedding)
    assert_same_bits(found[1], found[0])


def test_host_memory_that_does_not_suffice_is_a_line(folders, monkeypatch):
    def no_memory(*_):
        raise MemoryError("pinned host memory")

    monkeypatch.setattr(shared_memory, "empty_on_host", no_memory)
    with pytest.raises(UserError, match="does not fit the memory that is free on the host"):
        load_4bit(ModelSpec(str(folders["llama"])), FP32, layout=Layout(embedding_on_host=True))
