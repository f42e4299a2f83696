"""Out of memory, provoked: the run steps down, loses no step, and learns what it would have learnt."""

import gc
import re
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.data.batches import collate
from common.model.activation_checkpointing import Policy, checkpoint_activations, decoder_layers
from common.model.attention import PACKED_ATTENTION
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit
from common.model.lora import attach_lora
from common.model.weight_streaming import streamed_tensors, weight_ring
from common.recipe import LoraSpec, ModelSpec, UserError
from common.run import step_down
from common.run.held_out_loss import batch_nll
from common.run.step_down import StepDown
from common.run.trainer_config import build_trainer
from common.run.training import train
from common.tokens.labels import IGNORED
from tests import flash_on_cpu  # noqa: F401  (gives the CPU flash attention's operators)
from tests.conftest import FP32
from tests.machine.test_out_of_memory import OF_GPU, OTHERS
from tests.run.test_training import adapter, prepare, split


class Memory:
    """Raises OutOfMemoryError in a layer's forward pass when a limit is crossed."""

    def __init__(self, model, *, kept: int = 99, tokens: int = 1 << 30, after: int = 0, times: int = 1 << 30) -> None:
        self.model, self.kept, self.tokens, self.after, self.times = model, kept, tokens, after, times
        self.largest: list[int] = []  # tokens of each forward pass that succeeded
        self.failures = 0
        decoder_layers(model)[1].register_forward_pre_hook(self.check)

    def check(self, _, arguments) -> None:
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:  # evaluation, or a recompute
            return
        tokens = arguments[0].shape[0] * arguments[0].shape[1]
        kept = sum(not layer.gradient_checkpointing for layer in decoder_layers(self.model))
        self.after -= 1
        if self.after < 0 and self.failures < self.times and (kept > self.kept or tokens > self.tokens):
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory, injected")
        self.largest.append(tokens)


def run(recipe, plan, **limits):
    model, tokenizer, rows, recipe, plan = prepare(recipe, plan)
    memory = Memory(model, **limits) if limits else None
    metrics = train(model, tokenizer, rows, recipe, plan)
    return adapter(Path(recipe.out)), metrics, memory


def out(recipe, name):
    return replace(recipe, out=f"{recipe.out}-{name}")


def test_fewer_layers_are_kept_first_and_the_result_is_the_same_bit_for_bit(recipe, capsys):
    plan = split(recipe, 2, Policy(2, 2))
    expected, _, _ = run(out(recipe, "plenty"), plan)
    capsys.readouterr()
    # Fails in the first real step: a rehearsal has two micro-batches.
    got, metrics, memory = run(out(recipe, "tight"), plan, kept=1, after=2)
    assert memory.failures == 1
    assert metrics["step_downs"] == ["step 1: the first 1 of 2 layers recompute"]
    assert metrics["steps"] == 3
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert (
        "out of memory in step 1; going on with the first 1 of 2 layers recompute; rows per step stay the same"
        in capsys.readouterr().out
    )


def test_pitfall_32_then_micro_batches_are_cut_in_half_with_the_same_rows_per_step(recipe):
    plan = split(recipe, 4, Policy(2, 0))
    expected, plenty, _ = run(out(recipe, "plenty"), plan)
    got, metrics, memory = run(out(recipe, "tight"), plan, tokens=2 * 128)
    assert metrics["step_downs"] == ["step 1: each micro-batch in 2 parts"]
    assert max(memory.largest) <= 2 * 128
    assert len(memory.largest) == 2 + 3 * 2  # two halves in the rehearsal and in each of three steps
    for name in ("first_loss", "last_loss", "eval_loss"):
        assert metrics[name] == pytest.approx(plenty[name], rel=1e-5)
    for name in expected:  # the same sums in another order
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("after", [3, pytest.param(4, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_in_mid_step_the_step_begins_again_whatever_was_accumulated(recipe, after):
    plan = split(recipe, 2, Policy(2, 1))
    expected, _, _ = run(out(recipe, "plenty"), plan)
    got, metrics, memory = run(out(recipe, "tight"), plan, kept=0, after=after)
    # A rehearsal of two micro-batches, then steps of two: 3 is in the middle of the first step.
    assert metrics["step_downs"] == [f"step {(after - 2) // 2 + 1}: every layer recomputes"]
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_in_backward_the_half_made_gradients_are_thrown_away(recipe, monkeypatch):
    plan = split(recipe, 2, Policy(2, 1))
    expected, _, _ = run(out(recipe, "plenty"), plan)
    model, tokenizer, rows, tight, plan = prepare(out(recipe, "tight"), plan)
    calls = []

    def fail(_):
        calls.append(1)
        if len(calls) == 4:  # the rehearsal's two, one micro-batch, and the second one's backward at its first layer
            raise torch.OutOfMemoryError("CUDA out of memory, injected")

    next(p for name, p in model.named_parameters() if "layers.0" in name and "q_proj.lora_A" in name).register_hook(
        fail
    )
    metrics = train(model, tokenizer, rows, tight, plan)
    assert metrics["step_downs"] == ["step 1: every layer recomputes"]
    got = adapter(Path(tight.out))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_at_the_end_of_it_the_run_stops_with_one_line(recipe, capsys):
    with pytest.raises(
        UserError, match="out of GPU memory at step 1, even every layer recomputes, layer inputs in host"
    ):
        run(recipe, split(recipe, 4, Policy(2, 1)), tokens=10)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("out of memory")]
    less = [re.search("going on with (.*);", line)[1] for line in lines]
    assert less == [
        "every layer recomputes",
        "each micro-batch in 2 parts",
        "each micro-batch in 4 parts",
        "every layer recomputes, layer inputs in host memory",
    ]


def test_evaluation_out_of_memory_is_cut_in_half_too(recipe):
    model, tokenizer, rows, recipe, plan = prepare(recipe, split(recipe, 4, Policy(2, 0)))
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out))
    expected = trainer.evaluate()["eval_loss"]

    def check(_, arguments):
        if arguments[0].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory, injected")

    decoder_layers(model)[0].register_forward_pre_hook(check)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.step_down.taken == ["step 1: each micro-batch in 2 parts"]


def test_alone_it_recomputes_then_splits_then_moves_inputs_to_the_host(small_llama, capsys):
    """Two micro-batches of an optimizer step, and memory for one row without activations: nothing of it is lost."""
    model = attach_lora(load_4bit(ModelSpec(str(small_llama)), FP32), LoraSpec(4, 4))
    batches = [{"input_ids": torch.full((4, 8), 5 + number)} for number in range(2)]
    for batch in batches:
        batch |= {"labels": batch["input_ids"], "position_ids": torch.arange(8).repeat(4, 1)}
    before_retry: list[Policy] = []
    step_down = StepDown(model, Policy(2, 2), lambda: before_retry.append(step_down.policy))

    def rows_if_they_fit(part) -> torch.Tensor:
        if step_down.policy != Policy(2, offload=True):
            raise torch.OutOfMemoryError("CUDA out of memory, injected")
        computed.append(part["input_ids"])
        return torch.tensor(float(len(part["input_ids"])))

    computed: list[torch.Tensor] = []
    assert step_down.compute(rows_if_they_fit, batches, 7, backward=True) == 4
    assert torch.equal(torch.cat(computed), torch.cat([batch["input_ids"] for batch in batches]))
    assert step_down.taken == [
        "step 7: the first 1 of 2 layers recompute",
        "step 7: every layer recomputes",
        "step 7: each micro-batch in 2 parts",
        "step 7: each micro-batch in 4 parts",
        "step 7: every layer recomputes, layer inputs in host memory",
    ]
    assert len(before_retry) == 5
    assert all(layer.gradient_checkpointing for layer in decoder_layers(model))
    assert capsys.readouterr().out.count("out of memory in step 7; going on with ") == 5


def test_alone_what_saves_no_activations_is_only_split(small_llama):
    model = attach_lora(load_4bit(ModelSpec(str(small_llama)), FP32), LoraSpec(4, 4))
    ids = torch.full((2, 8), 5)
    step_down = StepDown(model, Policy(2, 2))

    def never_fits(_) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory, injected")

    with pytest.raises(torch.OutOfMemoryError):
        batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(8).repeat(2, 1)}
        step_down.compute(never_fits, [batch], 1, backward=False)
    assert step_down.taken == ["step 1: each micro-batch in 2 parts"]
    assert step_down.policy == Policy(2, 2)


@pytest.fixture
def two_rows(small_llama):
    """A model of two layers, and a micro-batch of two rows."""
    model = attach_lora(load_4bit(ModelSpec(str(small_llama)), FP32), LoraSpec(4, 4))
    ids = torch.full((2, 8), 5)
    return model, {"input_ids": ids, "labels": ids, "position_ids": torch.arange(8).repeat(2, 1)}


def failing(*errors: Exception):
    """A part's computation that raises the errors one after another, and then succeeds."""
    waiting = list(errors)

    def compute(_) -> torch.Tensor:
        if waiting:
            raise waiting.pop(0)
        return torch.ones(())

    return compute


@pytest.mark.parametrize("error", OF_GPU, ids=lambda error: str(error)[:40])
def test_whatever_it_is_called_out_of_memory_is_stepped_down(two_rows, error):
    model, batch = two_rows
    step_down = StepDown(model, Policy(2, 2))
    assert step_down.compute(failing(error), [batch], 1, backward=True) == 1
    assert step_down.policy == Policy(2, 1)


@pytest.mark.parametrize("error", OTHERS[:4], ids=lambda error: str(error)[:40])
def test_after_an_error_that_loses_the_gpu_nothing_is_tried_again(two_rows, error):
    model, batch = two_rows
    step_down = StepDown(model, Policy(2, 2))
    with pytest.raises(type(error)):
        step_down.compute(failing(error), [batch], 1, backward=True)
    assert step_down.taken == []


@pytest.fixture
def gpu_calls(monkeypatch):
    """The calls of torch that only a GPU answers, in order."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module, name in (
        (torch.cuda, "synchronize"),
        (torch.cuda, "empty_cache"),
        (torch.accelerator, "empty_host_cache"),
    ):
        monkeypatch.setattr(module, name, lambda name=name: calls.append(name))
    return calls


def test_copies_under_way_end_before_their_tensors_die_and_cycles_before_the_cache_is_emptied(
    two_rows, gpu_calls, monkeypatch
):
    class Tensors(dict):
        """What a step that failed holds: some of it in its frames, some in a cycle."""

    model, batch = two_rows
    held: list[weakref.ref] = []
    alive_at: dict[str, list[bool]] = {}

    def fail_once(_) -> torch.Tensor:
        if not held:
            in_frame, in_cycle = Tensors(), Tensors()
            in_cycle["itself"] = in_cycle
            held.extend((weakref.ref(in_frame), weakref.ref(in_cycle)))
            raise torch.OutOfMemoryError("CUDA out of memory, injected")
        return torch.ones(())

    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(
            torch.cuda, name, lambda name=name: alive_at.update({name: [tensors() is not None for tensors in held]})
        )
    gc.disable()  # as it is between two of the collector's own runs
    try:
        StepDown(model, Policy(2, 2)).compute(fail_once, [batch], 1, backward=True)
    finally:
        gc.enable()
    assert alive_at == {"synchronize": [True, True], "empty_cache": [False, False]}


def test_a_gpu_that_turns_out_to_be_lost_ends_it(two_rows, gpu_calls, monkeypatch):
    """cublasCreate says NOT_INITIALIZED both without memory and after an error that came before."""
    model, batch = two_rows

    def lost() -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    step_down = StepDown(model, Policy(2, 2))
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        step_down.compute(failing(error), [batch], 1, backward=True)
    assert step_down.taken == []


def test_out_of_host_memory_nothing_more_moves_there(two_rows, gpu_calls, capsys):
    """First half as much waits in host memory, then nothing; and out of GPU memory after that nothing goes back."""
    model, batch = two_rows
    step_down = StepDown(model, Policy(2, 1, offload=True))
    no_host, no_gpu = MemoryError("pinned host memory"), torch.OutOfMemoryError("CUDA out of memory, injected")
    errors = [no_host, no_host, no_gpu, no_gpu]
    with pytest.raises(torch.OutOfMemoryError):
        step_down.compute(failing(*errors), [batch], 3, backward=True)
    assert step_down.taken == [
        "step 3: each micro-batch in 2 parts",
        "step 3: the first 1 of 2 layers recompute",
        "step 3: every layer recomputes",
    ]
    out = capsys.readouterr().out
    assert out.count("out of host memory in step 3; going on with ") == 2
    assert gpu_calls.count("empty_host_cache") == 3


def test_what_a_failed_step_left_in_host_memory_is_dropped(two_rows):
    """Also by a step down that only halves the micro-batches."""
    model, batch = two_rows
    step_down = StepDown(model, Policy(2, 0, offload=True))
    checkpoint_activations(model, step_down.policy)
    left = weakref.ref(decoder_layers(model)[0]._gradient_checkpointing_func.args[1])
    step_down.compute(failing(torch.OutOfMemoryError("CUDA out of memory")), [batch], 1, backward=True)
    assert step_down.taken == ["step 1: each micro-batch in 2 parts"]
    assert left() is None


def test_long_rows_take_smaller_tiles_before_micro_batches_are_cut_in_half(small_llama, capsys):
    """A model in tiles whose memory never suffices: every lever in turn, and the last gradients are right."""
    model = attach_lora(load_4bit(ModelSpec(str(small_llama)), FP32), LoraSpec(4, 8))
    use_lean_layers(model, "lean")
    model.set_attn_implementation(PACKED_ATTENTION)
    rows = [{"input_ids": [7] * n, "labels": [IGNORED] + [7] * (n - 1), "seq_lengths": [n]} for n in (9, 12)]
    batch = collate(rows, 0, padding_free=True)
    failures = iter([True] * 6)

    def compute(part):
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory, injected")
        loss = model(**part, num_items_in_batch=19).loss
        loss.backward()
        return loss.detach()

    policy = Policy(2, tile=2048)
    checkpoint_activations(model.train(), policy)
    down = StepDown(model, policy)
    down.compute(compute, [batch], 1, backward=True)
    again = "attention's backward by key/value head, which computes queries, keys and values again"
    assert [less.removeprefix("step 1: every layer recomputes, ") for less in down.taken] == [
        "in tiles of 2,048 tokens, attention's backward by key/value head",
        "in tiles of 1,024 tokens, attention's backward by key/value head",
        "in tiles of 512 tokens, attention's backward by key/value head",
        f"in tiles of 512 tokens, {again}",
        "step 1: each micro-batch in 2 parts",
        f"layer inputs in host memory, in tiles of 512 tokens, {again}",
    ]
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    checkpoint_activations(model, Policy(2, 2))
    model.zero_grad()
    model(**batch, num_items_in_batch=19).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_single_row_that_cannot_be_cut_is_computed_in_tiles_at_last(small_llama):
    model = attach_lora(load_4bit(ModelSpec(str(small_llama)), FP32), LoraSpec(4, 8))
    use_lean_layers(model, "lean")
    model.set_attn_implementation(PACKED_ATTENTION)
    batch = collate([{"input_ids": [7] * 9, "labels": [7] * 9, "seq_lengths": [9]}], 0, padding_free=True)
    down = StepDown(model, Policy(2, offload=True))

    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory, injected")

    with pytest.raises(torch.OutOfMemoryError):
        down.compute(fail, [batch], 1, backward=True)
    assert down.policy == Policy(2, offload=True, tile=512, by_head=True, qkv_again=True)
    model.set_attn_implementation("sdpa")  # with a mask there are no tiles
    down = StepDown(model, Policy(2, offload=True))
    checkpoint_activations(model, down.policy)
    with pytest.raises(torch.OutOfMemoryError):
        down.compute(fail, [batch], 1, backward=True)
    assert down.policy == Policy(2, offload=True)


def test_an_evaluation_that_runs_out_of_memory_goes_on_in_tiles(small_llama):
    """A single row cannot be cut; without gradients tiles take less too."""
    model = attach_lora(load_4bit(ModelSpec(str(small_llama)), FP32), LoraSpec(4, 8))
    use_lean_layers(model, "lean")
    model.set_attn_implementation(PACKED_ATTENTION)
    batch = collate([{"input_ids": [7] * 9, "labels": [IGNORED] + [7] * 8, "seq_lengths": [9]}], 0, padding_free=True)
    policy = Policy(2, offload=True)
    checkpoint_activations(model, policy)
    expected = batch_nll(model, batch)
    down, failures = StepDown(model, policy), iter([True] * 2)

    def compute(part):
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory, injected")
        return batch_nll(model, part)

    found = down.compute(compute, [batch], 1, backward=False)
    assert down.policy == Policy(2, offload=True, tile=4096, by_head=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_at_last_the_weights_of_all_layers_move_to_host_memory_and_nothing_changes_by_a_bit(small_model, monkeypatch):
    """In mid-step, after a backward pass with them on the device; in an evaluation; not where the host has no room."""
    folder, policy = small_model(num_hidden_layers=4), Policy(4, offload=True)
    ids = torch.arange(5, 13)[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(8)[None]}
    error = torch.OutOfMemoryError("CUDA out of memory, injected")
    moved = ["step 1: the weights of all 4 layers in host memory"]
    models = [attach_lora(load_4bit(ModelSpec(str(folder)), FP32), LoraSpec(4, 4)) for _ in range(2)]
    found = []
    for model, fits in zip(models, (True, False), strict=True):
        checkpoint_activations(model, policy)

        def compute(part, model=model, fits=fits) -> torch.Tensor:
            loss = model(**part).loss
            loss.backward()
            if not fits and weight_ring(model) is None:
                raise error
            return loss.detach()

        down = StepDown(model, policy)
        loss = down.compute(compute, [batch], 1, backward=True)
        assert down.taken == ([] if fits else moved)
        found.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    needed = sum(streamed_tensors(layer)[1] for layer in decoder_layers(models[0]))
    for available, taken in ((needed, []), (needed + 1, moved)):
        monkeypatch.setattr(step_down, "available_ram", lambda available=available: available)
        down = StepDown(models[0], policy)
        with nullcontext() if taken else pytest.raises(torch.OutOfMemoryError):
            down.compute(failing(error), [batch], 1, backward=False)
        assert down.taken == taken
