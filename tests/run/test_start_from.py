"""A run that starts from an earlier adapter: its first weights, its losses, its record, and what is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from common.adapter.find import find_adapter
from common.adapter.load import load_trained
from common.commands.dryrun import shrink_to_dry_run
from common.model.loading import load_4bit
from common.model.lora import attach_lora, unmoved_adapters
from common.model.start_adapter import started_from
from common.plan.machine_plan import plan_for_card
from common.recipe import DataSpec, LoraSpec, ModelSpec, Recipe, TrainSpec, UserError
from common.run.metrics_file import read_metrics
from common.run.report import write_report
from common.run.training import train
from tests.conftest import FP32, ROOT, TRAIN
from tests.machine.test_processes import CPU, launcher
from tests.run.test_training import adapter, prepare

IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def first(small_llama, tmp_path_factory) -> Recipe:
    """A recipe whose run has ended."""
    recipe = Recipe(
        model=ModelSpec(str(small_llama)),
        data=DataSpec(TRAIN, eval_rows=20, drift_source=None),
        lora=LoraSpec(rank=4, alpha=8),
        train=TrainSpec(seq_len=128, rows_per_step=4, learning_rate=5e-3, max_steps=3, sample_answers=0),
        card_gib=None,
        out=str(tmp_path_factory.mktemp("first") / "run"),
    )
    train(*prepare(recipe))
    return recipe


@pytest.fixture
def second(first, tmp_path) -> Recipe:
    """A recipe that goes on with that adapter, of which it has a copy."""
    shutil.copytree(first.out, tmp_path / "first")
    lora = replace(first.lora, start_from=str(tmp_path / "first"))
    values = replace(first.train, max_steps=4, save_every=2, learning_rate=1e-3)
    return replace(first, lora=lora, train=values, out=str(tmp_path / "second"))


def start(recipe: Recipe) -> Path:
    return Path(recipe.lora.start_from)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_first_weights_are_the_adapters_to_the_bit_and_so_is_the_held_out_loss(first, second, capsys):
    model, *_ = prepare(second)
    weights = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert weights.keys() == adapter(first.out).keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in adapter(first.out).items())
    assert f"adapter: starts from the one in {start(second)}, which 3 steps trained; steps" in capsys.readouterr().out
    train(*prepare(second))
    last, begin = (
        entry["eval_loss"] for entry in (read_metrics(Path(first.out))[-1], read_metrics(Path(second.out))[0])
    )
    assert begin == pytest.approx(last, abs=1e-6)


def test_a_run_records_where_it_started_leaves_that_alone_and_is_used_like_any_other(first, second):
    files = {path: path.read_bytes() for path in start(second).rglob("*") if path.is_file()}
    train(*prepare(second))
    assert {path: path.read_bytes() for path in start(second).rglob("*") if path.is_file()} == files
    run = json.loads((Path(second.out) / "run.json").read_text())
    sha256 = json.loads((Path(first.out) / "run.json").read_text())["adapter_sha256"]
    assert run["start"] == {"start_from": str(start(second)), "sha256": sha256, "earlier": None}
    assert run["recipe"]["lora"]["start_from"] == str(start(second))
    assert "It started from the adapter in" in Path(write_report(Path(second.out))).read_text()
    shutil.rmtree(start(second))  # what comes after a run does not need it
    found = find_adapter(replace(first, out=second.out))
    with torch.no_grad():
        after, before = (load_trained(found)(IDS).logits, load_trained(find_adapter(first))(IDS).logits)
    assert not torch.equal(after, before)
    third = replace(second, lora=replace(second.lora, start_from=second.out), out=f"{second.out}-third")
    train(*prepare(third))
    earlier = json.loads((Path(third.out) / "run.json").read_text())["start"]["earlier"]
    assert earlier["sha256"] == sha256


def test_a_resumed_run_ends_at_the_same_adapter_bit_for_bit_and_knows_its_start_by_content(second, tmp_path, capsys):
    train(*prepare(second))
    whole = adapter(second.out)
    shutil.rmtree(Path(second.out) / "checkpoints" / "checkpoint-4")
    moved = shutil.copytree(start(second), tmp_path / "moved")
    again = replace(second, existing_run="resume", lora=replace(second.lora, start_from=str(moved)))
    train(*prepare(again))
    assert "LoraSpec.start_from was" in (out := capsys.readouterr().out) and "its content is the same" in out
    assert all(torch.equal(adapter(second.out)[name], tensor) for name, tensor in whole.items())
    (moved / "run.json").unlink()
    save_file({name: 2 * tensor for name, tensor in adapter(moved).items()}, moved / "adapter_model.safetensors")
    with pytest.raises(UserError, match="the adapter that the run started from is not what it was"):
        train(*prepare(again))
    other = shutil.copytree(moved, tmp_path / "other")
    with pytest.raises(UserError, match="belongs to another run:\n  LoraSpec.start_from was"):
        train(*prepare(replace(again, lora=replace(again.lora, start_from=str(other)))))


def test_a_run_that_starts_anew_cannot_be_gone_on_with_from_an_adapter(second):
    anew = replace(second, lora=replace(second.lora, start_from=None))
    train(*prepare(anew))
    with pytest.raises(UserError, match="LoraSpec.start_from was None and is"):
        train(*prepare(replace(second, existing_run="resume")))


def test_an_adapter_that_did_not_move_from_its_start_is_no_success(second):
    slow = replace(second, train=replace(second.train, learning_rate=1e-30))
    with pytest.raises(UserError, match="4 steps taught nothing: the adapter is what it was before the first"):
        train(*prepare(slow))


def test_a_layer_has_learnt_where_any_of_its_tensors_moved(second):
    model, *_ = prepare(second)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(unmoved_adapters(tensors, started_from(model))) == 14
    first_a = next(name for name in tensors if "lora_A" in name)
    tensors[first_a][0, 0] += 1
    assert first_a.replace("lora_A", "lora_B") not in (rest := unmoved_adapters(tensors, started_from(model)))
    assert len(rest) == 13


@pytest.mark.parametrize(
    "lora",
    [LoraSpec(4, 8, dora=True), LoraSpec(4, 7.5, rslora=True), LoraSpec(2, 2, target_modules=("v_proj", "q_proj"))],
    ids=["dora", "rslora", "two modules"],
)
@pytest.mark.parametrize("bits", [4, 16])
def test_an_adapter_that_peft_made_is_taken_up_whatever_its_kind_and_the_bits_of_the_base(
    small_llama, tmp_path, lora, bits
):
    spec = ModelSpec(str(small_llama), bits=bits)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        target_modules=list(lora.target_modules),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(load_4bit(spec, FP32), config)
    theirs.save_pretrained(tmp_path / "theirs")
    change(tmp_path / "theirs" / "adapter_config.json", init_lora_weights=True)
    ours = attach_lora(load_4bit(spec, FP32), replace(lora, start_from=str(tmp_path / "theirs")))
    with torch.no_grad():
        assert torch.equal(ours.eval()(IDS).logits, theirs.eval()(IDS).logits)


def harmed(harm):
    def apply(recipe: Recipe) -> Recipe:
        harm(start(recipe))
        return recipe

    return apply


def lora(**values):
    return lambda recipe: replace(recipe, lora=replace(recipe.lora, **values))


def config(**values):
    return harmed(lambda folder: change(folder / "adapter_config.json", **values))


def cut_short(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_bytes(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lora(start_from="outputs/gone"), "is outputs/gone, and there is no such folder: name that of an earlier run"),
        (harmed(lambda folder: (folder / "adapter_config.json").unlink()), "has no adapter .adapter_config.json is"),
        (harmed(cut_short), "is cut short"),
        (harmed(other_bytes), "is damaged: it is not what the run there wrote"),
        (lora(rank=8), r"has rank=4, and the recipe says rank=8. .* write LoraSpec\(rank=4, start_from='"),
        (
            lora(alpha=16, rslora=True),
            r"has alpha=8, rslora=False, and .* write LoraSpec\(alpha=8, rslora=False, start",
        ),
        (lora(dora=True), "has dora=False, and the recipe says dora=True"),
        (lora(target_modules=("q_proj",)), r"has target_modules=\('q_proj', 'k_proj', .*'down_proj'\), and the recipe"),
        (
            config(alpha_pattern={"q_proj": 2}),
            "has values of their own for some layers .alpha_pattern., which LoraSpec",
        ),
        (config(modules_to_save=["lm_head"]), "more than LoRA"),
        (config(base_model_name_or_path="other/base"), "was trained on other/base, and the recipe says"),
        (lambda recipe: replace(recipe, out=recipe.lora.start_from), "in the folder that this run writes into: choose"),
        (
            lambda recipe: replace(recipe, out=str(start(recipe).parent)),
            "in the folder that this run writes into: choose",
        ),
    ],
)
def test_a_start_that_cannot_be_is_one_line_before_anything_is_downloaded(second, edit, message):
    with pytest.raises(UserError, match=message):
        plan_for_card(edit(second))


def test_a_base_that_has_changed_since_is_found_when_it_is_loaded(second):
    run = json.loads((start(second) / "run.json").read_text())
    change(start(second) / "run.json", base=run["base"] | {"sha256": {"model.safetensors": "0"}})
    with pytest.raises(
        UserError, match="is not what the adapter in .* was trained on: .* changed since. Bring it back"
    ):
        prepare(second)


def test_numbers_that_are_not_finite_are_no_start(second):
    (start(second) / "run.json").unlink()
    weights = adapter(start(second))
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, start(second) / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds numbers that are not finite"):
        prepare(second)


def test_an_adapter_of_a_dry_run_is_no_start_and_a_dry_run_starts_anew(second):
    run = json.loads((start(second) / "run.json").read_text())
    run["recipe"]["model"]["weights"] = "random"
    change(start(second) / "run.json", recipe=run["recipe"])
    with pytest.raises(UserError, match="was trained on random weights, in a dry run"):
        plan_for_card(second)
    assert shrink_to_dry_run(second).lora.start_from is None


SCRIPT = """
import sys
from dataclasses import replace
from common.cli import run
from recipes.tiny import RECIPE, main

values = replace(RECIPE.train, rows_per_step=4, max_steps=2, sharding="always", sample_answers=0, learning_rate=1e-3)
recipe = replace(RECIPE, train=values, data=replace(RECIPE.data, drift_source=None))
if len(sys.argv) > 3:
    recipe = replace(recipe, lora=replace(recipe.lora, start_from=sys.argv.pop()))
sys.exit(run(main, recipe))
"""


@pytest.mark.slow  # 40 s: three runs with answers before and after them
def test_sharded_layers_start_from_an_adapter_as_one_process_does(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(name: str, processes: int, *words: str) -> str:
        command = [sys.executable, *launcher(processes), str(tmp_path / "script.py"), "--out", str(tmp_path / name)]
        given = subprocess.run([*command, *words], capture_output=True, text=True, cwd=ROOT, env=CPU, timeout=300)
        assert given.returncode == 0, given.stderr[-3000:]
        return given.stdout

    run("first", 1)
    run("alone", 1, str(tmp_path / "first"))
    out = run("together", 2, str(tmp_path / "first"))
    assert "layers sharded over 2 cards" in out and out.count("adapter: starts from the one in") == 1
    alone, together = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "together"))
    begin = load_file(tmp_path / "first" / "adapter_model.safetensors")
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=2e-4)
    moved = max((alone[name] - tensor).abs().max() for name, tensor in begin.items())
    assert moved > 1e-3
    losses = [read_metrics(tmp_path / name)[0]["eval_loss"] for name in ("alone", "together")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] == pytest.approx(read_metrics(tmp_path / "first")[-1]["eval_loss"], abs=1e-5)
