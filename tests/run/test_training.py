"""Whole runs on small models: the same functions, in the same order, as in a recipe."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from common.data.batches import collate
from common.data.rows import load_rows
from common.data.steps import settle_rows_per_step
from common.machine.layout import Layout
from common.model.activation_checkpointing import Policy, checkpoint_activations
from common.model.attention import PACKED_ATTENTION
from common.model.lean_layers import use_lean_layers
from common.model.loading import load_4bit, load_tokenizer
from common.model.lora import attach_lora
from common.plan.machine_plan import plan_for_card
from common.plan.plan import Plan
from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, UserError
from common.run.metrics_file import read_metrics
from common.run.trainer import Trainer
from common.run.trainer_config import build_trainer
from common.run.training import _failures_in_words, train
from tests import flash_on_cpu  # noqa: F401  (gives the CPU flash attention's operators)
from tests.conftest import ARCHITECTURES, FP32, TRAIN

EVERY = Policy(2)


def prepare(recipe: Recipe, plan: Plan | None = None):
    """A recipe's story up to training."""
    Path(recipe.out).mkdir(parents=True, exist_ok=True)
    plan = plan or plan_for_card(recipe)
    tokenizer = load_tokenizer(recipe.model)
    rows = load_rows(recipe.data, tokenizer, recipe.train.seq_len, recipe.train.seed)
    model = attach_lora(load_4bit(recipe.model, FP32), recipe.lora, recipe.train.seed)
    use_lean_layers(model, recipe.train.kernels)
    checkpoint_activations(model, plan.checkpointing)
    return model, tokenizer, rows, recipe, plan


def split(recipe: Recipe, micro_batch_rows: int, policy: Policy = EVERY) -> Plan:
    return Plan(micro_batch_rows, recipe.train.rows_per_step // micro_batch_rows, Layout(), policy, "a test")


def adapter(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def step_gradients(recipe: Recipe, micro_batch_rows: int) -> dict[str, torch.Tensor]:
    """Adapter gradients of one optimizer step over the same rows, in micro-batches of the given size."""
    model, tokenizer, rows, recipe, plan = prepare(recipe, split(recipe, micro_batch_rows))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    trainer = build_trainer(model, tokenizer, rows, recipe, plan, Path(recipe.out))
    model.train()
    loader = DataLoader(rows.train, micro_batch_rows, collate_fn=partial(collate, pad_token_id=tokenizer.pad_token_id))
    trainer.current_gradient_accumulation_steps = plan.accumulation
    batches, tokens = trainer.get_batch_samples(iter(loader), plan.accumulation, torch.device("cpu"))
    for batch in batches:
        trainer.training_step(model, batch, tokens)
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_pitfall_1_splitting_the_rows_into_micro_batches_changes_nothing(recipe):
    torch.manual_seed(0)
    whole = step_gradients(recipe, micro_batch_rows=4)
    torch.manual_seed(0)
    parts = step_gradients(recipe, micro_batch_rows=1)
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-3
    for name, gradient in whole.items():
        # The same sum in another order: fp32 rounding, relative to the largest entry.
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=2e-6 * gradient.abs().max().item() + 1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_was_trained_loads_with_plain_peft_and_gives_the_same_logits(small_model, recipe, architecture):
    recipe = replace(recipe, model=ModelSpec(str(small_model(architecture))))
    model, tokenizer, rows, recipe, plan = prepare(recipe)
    metrics = train(model, tokenizer, rows, recipe, plan)
    assert metrics["steps"] == 3
    assert metrics["eval_loss"] < metrics["eval_loss_before"]

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    base = AutoModelForCausalLM.from_pretrained(
        recipe.model.name, quantization_config=quantisation, dtype=torch.float32
    )
    plain = PeftModel.from_pretrained(base, recipe.out)
    for module in plain.modules():  # see load_4bit: compare what was trained, not what eval mode rounds it to
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    again = AutoTokenizer.from_pretrained(recipe.out)
    ids = again.apply_chat_template([{"role": "user", "content": "Hello"}], return_tensors="pt", return_dict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**ids).logits, model.eval()(**ids).logits, rtol=0, atol=1e-5)
        with model.disable_adapter():
            assert (plain(**ids).logits - model(**ids).logits).abs().max() > 1e-3


def test_a_run_leaves_its_files_and_nothing_else(recipe):
    train(*prepare(recipe))
    folder = Path(recipe.out)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "checkpoints",
        "generation_config.json",
        "held_out.parquet",
        "loss.png",
        "report.html",
        "metrics.jsonl",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    run = json.loads((folder / "run.json").read_text())
    assert run["recipe"]["lora"]["rank"] == 4
    assert run["versions"]["torch"] == torch.__version__
    assert run["metrics"]["steps"] == 3
    assert run["metrics"]["eval_loss"] < run["metrics"]["eval_loss_before"]
    assert run["plan"]["micro_batch_rows"] * run["plan"]["accumulation"] == 4
    entries = read_metrics(folder)
    last = [e for e in entries if "loss" in e][-1]
    assert {name: run["metrics"][name] for name in ("seconds", "tokens", "tokens_per_s")}.items() <= last.items()
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 3]
    assert all(e["tokens_per_s"] > 0 and e["peak_gib"] > 0 for e in entries if "loss" in e)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_adapter_bit_for_bit(recipe, tmp_path):
    for out in ("a", "b"):
        train(*prepare(replace(recipe, out=str(tmp_path / out))))
    first, second = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    train(*prepare(replace(recipe, out=str(tmp_path / "c"), train=replace(recipe.train, seed=1))))
    assert not all(torch.equal(first[name], tensor) for name, tensor in adapter(tmp_path / "c").items())


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_8bit"])
def test_pitfall_20_a_resumed_run_ends_at_the_same_adapter(recipe, tmp_path, optimizer, monkeypatch, capsys):
    spec = replace(recipe.train, max_steps=4, save_every=2, optimizer=optimizer)
    recipe = replace(recipe, train=spec, lora=LoraSpec(rank=4, alpha=8, dropout=0.1))
    train(*prepare(replace(recipe, out=str(tmp_path / "whole"))))
    broken = replace(recipe, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "log", interrupt_at(3))
        with pytest.raises(KeyboardInterrupt):
            train(*prepare(broken))
    train(*prepare(replace(broken, existing_run="resume")))
    assert "going on from" in capsys.readouterr().out
    assert [e["step"] for e in read_metrics(tmp_path / "broken") if "loss" in e] == [1, 2, 3, 4]
    whole, resumed = adapter(tmp_path / "whole"), adapter(tmp_path / "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_in_tiles_learns_as_without_and_is_resumed_bit_for_bit(recipe, tmp_path, monkeypatch):
    """Packed rows through the whole trainer: held adapters, clipping, rehearsal, evaluation and recompute check."""
    recipe = replace(recipe, train=replace(recipe.train, max_steps=4, save_every=2))

    def in_tiles(out: str, policy: Policy, **changes):
        arguments = prepare(replace(recipe, out=str(tmp_path / out), **changes), split(recipe, 2))
        model = arguments[0]
        model.set_attn_implementation(PACKED_ATTENTION)
        checkpoint_activations(model, policy)
        return *arguments[:4], split(recipe, 2, policy)

    layers = EVERY.layers
    tiles = Policy(layers, tile=48, by_head=True, offload=True)
    metrics = [train(*in_tiles(out, policy)) for out, policy in (("plain", Policy(layers)), ("whole", tiles))]
    assert metrics[1]["step_downs"] == []
    for name in ("first_loss", "last_loss", "eval_loss"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "log", interrupt_at(3))
        with pytest.raises(KeyboardInterrupt):
            train(*in_tiles("broken", tiles))
    train(*in_tiles("broken", tiles, existing_run="resume"))
    whole, resumed = adapter(tmp_path / "whole"), adapter(tmp_path / "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def interrupt_at(step: int):
    """A Trainer.log that logs as ever, and is interrupted when it logs that step's loss."""
    log = Trainer.log

    def interrupted(self, logs, *rest) -> None:
        log(self, logs, *rest)
        if self.state.global_step >= step:
            raise KeyboardInterrupt

    return interrupted


def test_resuming_without_a_checkpoint_starts_from_the_beginning(recipe, capsys):
    train(*prepare(replace(recipe, existing_run="resume")))
    assert "holds no checkpoint to go on from: starting from the beginning" in capsys.readouterr().out


def test_checkpoints_hold_no_pickled_settings_and_the_last_two_stay(recipe):
    train(*prepare(replace(recipe, train=replace(recipe.train, save_every=1))))
    checkpoints = sorted((Path(recipe.out) / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["checkpoint-2", "checkpoint-3"]
    assert not list(Path(recipe.out).rglob("training_args.bin"))


def test_an_access_token_is_never_written(recipe, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_canary0123456789")
    train(*prepare(recipe))
    written = b"".join(path.read_bytes() for path in Path(recipe.out).rglob("*") if path.is_file())
    assert b"hf_canary" not in written
    assert "hf_canary" not in "".join(capsys.readouterr())


def test_a_run_asks_nobody_on_the_network(recipe, monkeypatch):
    model, tokenizer, rows, recipe, plan = prepare(recipe)
    model.peft_config["default"].base_model_name_or_path = "owner/model"  # PEFT would look its config up on the hub
    asked = []
    monkeypatch.delenv("CI", raising=False)  # TRL does not report from CI
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: asked.append(address))
    monkeypatch.setattr("socket.socket.connect", lambda _, address: asked.append(address))
    train(model, tokenizer, rows, recipe, plan)
    assert asked == []
    assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY


def test_fewer_rows_than_a_step_has_still_train_and_are_pointed_out(recipe, tmp_path, capsys):
    data = tmp_path / "few.jsonl"
    data.write_text("\n".join(Path(TRAIN).read_text().splitlines()[:4]) + "\n")
    recipe = replace(recipe, data=DataSpec(str(data), eval_rows=0, drift_source=None))
    metrics = train(*prepare(recipe, split(recipe, micro_batch_rows=1)))
    assert metrics["steps"] == 3
    said = capsys.readouterr().out
    assert "optimizer steps: 1 an epoch (2 packed rows, 4 a step); the run takes 3" in said


def test_rows_per_step_auto_is_settled_by_the_data_and_kept_in_run_json(recipe, capsys):
    """60 conversations are too few for 100 steps of more than one row; the plan was for 16."""
    auto = replace(recipe.train, rows_per_step="auto", learning_rate=4e-3, epochs=0.2, max_steps=None, save_every=1)
    recipe = replace(recipe, train=auto)
    plan = plan_for_card(recipe)
    assert plan.rows_per_step == 16 and "plan: up to 16 rows of 128 tokens" in plan.text
    metrics = train(*prepare(recipe, plan))
    run = json.loads((Path(recipe.out) / "run.json").read_text())
    assert (run["recipe"]["train"]["rows_per_step"], run["recipe"]["train"]["learning_rate"]) == (1, 1e-3)
    assert metrics["recipe_as_written"] == {"rows_per_step": "auto", "learning_rate": 4e-3}
    assert run["plan"]["micro_batch_rows"] * run["plan"]["accumulation"] == 1
    said = capsys.readouterr().out
    assert "learning_rate 0.004 × √(1/16) = 0.001" in said and "warning: the run takes" in said
    steps = metrics["steps"]
    assert max(entry["learning_rate"] for entry in read_metrics(Path(recipe.out)) if "loss" in entry) <= 1e-3
    assert "settled by the data: 1 row a step, 1 micro-batch of 1 row" in run["plan"]["text"]
    page = (Path(recipe.out) / "report.html").read_text()
    assert "peak learning rate 0.001, cosine, 1 row of 128 tokens per step (rows_per_step=" in page
    again = train(*prepare(replace(recipe, existing_run="resume"), plan))  # its checkpoints are this recipe's
    assert again["steps"] == steps


def test_a_resumed_run_with_auto_keeps_its_rows_per_step_when_its_epochs_change(recipe, capsys):
    """72 rows: one row a step in one epoch, four in six. The run takes two steps, then one of the longer schedule."""
    auto = replace(recipe.train, rows_per_step="auto", learning_rate=4e-3, epochs=1.0, max_steps=2, save_every=2)
    recipe = replace(recipe, train=auto)
    train(*prepare(recipe))
    longer = replace(recipe, train=replace(auto, epochs=6.0, max_steps=3), existing_run="resume")
    assert settle_rows_per_step(longer.train, 72).rows_per_step == 4
    capsys.readouterr()
    assert train(*prepare(longer))["steps"] == 3
    said = capsys.readouterr().out
    assert "kept from the run's beginning, for rows_per_step=" in said and "TrainSpec.epochs was 1.0 and is 6.0" in said
    assert json.loads((Path(recipe.out) / "run.json").read_text())["recipe"]["train"]["rows_per_step"] == 1


@pytest.mark.parametrize(
    "policy", [EVERY, Policy(2, 1), Policy(2, keep_attention=True), Policy(2, offload=True)], ids=str
)
def test_every_policy_gives_the_same_adapter(recipe, tmp_path, policy):
    recipe = replace(recipe, out=str(tmp_path / "run"))
    train(*prepare(recipe, split(recipe, 2, policy)))
    reference = replace(recipe, out=str(tmp_path / "reference"))
    train(*prepare(reference, split(reference, 2, Policy(2, 2))))
    first, second = adapter(tmp_path / "run"), adapter(tmp_path / "reference")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pitfall_33_a_loss_that_is_not_a_number_stops_the_run(recipe):
    model, tokenizer, rows, recipe, plan = prepare(recipe)
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
    with pytest.raises(UserError, match="step 1: the loss is nan"):
        train(model, tokenizer, rows, recipe, plan)
    assert not (Path(recipe.out) / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of GPU memory at step 1, even .*Lower TrainSpec.seq_len"),
        (torch.AcceleratorError("CUDA error: out of memory"), "out of GPU memory at step 1, even "),
        (MemoryError("pinned host memory"), "out of host memory at step 1 .*free -h .* or lower TrainSpec.seq_len"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_running_out_of_memory_is_one_line(recipe, monkeypatch, error, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(UserError, match=line):
        train(*prepare(recipe))


@pytest.mark.parametrize(("layers", "on_host", "says"), [(4, 0, True), (4, 4, False), (2, 0, False)])
def test_of_several_gpus_it_names_how_many_layers_weights_can_wait(small_model, layers, on_host, says):
    model = AutoModelForCausalLM.from_pretrained(small_model(num_hidden_layers=layers))
    plan = Plan(1, 4, Layout(2, on_host=on_host), Policy(layers), "a test")
    trainer: Any = SimpleNamespace(state=SimpleNamespace(global_step=6), policy=plan.checkpointing, model=model)
    with (
        pytest.raises(UserError, match="at step 7. With several GPUs none") as raised,
        _failures_in_words(trainer, plan, None),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert ('wait in host memory: SET="train.weights_on_host=4"' in str(raised.value)) == says


@pytest.mark.parametrize("lora", [LoraSpec(rank=4, alpha=8, rslora=True), LoraSpec(rank=4, alpha=8, dora=True)])
def test_rslora_and_dora_train(recipe, lora):
    metrics = train(*prepare(replace(recipe, lora=lora)))
    assert metrics["eval_loss"] < metrics["eval_loss_before"]


def test_a_tracker_gets_the_same_metrics(recipe, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # so that what the run sets is taken back
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    recipe = replace(recipe, train=replace(recipe.train, report_to="tensorboard"))
    train(*prepare(recipe))
    events = EventAccumulator(str(Path(recipe.out) / "tensorboard")).Reload()
    print(events.Tags()["scalars"])
    entries = read_metrics(Path(recipe.out))
    for tag, key in (("train/loss", "loss"), ("train/learning_rate", "learning_rate"), ("eval/loss", "eval_loss")):
        wanted = [(entry["step"], pytest.approx(entry[key], rel=1e-5)) for entry in entries if key in entry]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == wanted
    for path in (Path(recipe.out) / "tensorboard").iterdir():
        assert b"hf_canary" not in path.read_bytes()
