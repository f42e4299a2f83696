"""The plan of a run: for the GPUs of the machine that it runs on, or for its CPU."""

from dataclasses import replace

from common.kernels import say_references_run
from common.kernels.triton_check import why_no_triton
from common.machine.collectives import all_gather, broadcast_from_main
from common.machine.device import (
    GIB,
    Machine,
    available_ram,
    compute_dtype,
    require_gpu,
    this_machine,
    warn_of_unused_gpu,
)
from common.machine.layout import Layout
from common.machine.processes import local_world_size, world_size
from common.model.activation_checkpointing import Policy
from common.model.attention import PACKED_ATTENTION, attention_implementation, attention_of
from common.model.config import load_config, refuse_more_positions
from common.model.sharding import refuse_unshardable
from common.model.start_adapter import find_start_adapter
from common.plan.card import Card, smallest_of
from common.plan.forecast import Setting
from common.plan.misfit import explain_examples
from common.plan.plan import Plan, build_plan, make_plan, plan_on
from common.plan.planner import Planner, refuse_weights_on_host
from common.plan.speed import KnownGpu
from common.recipe import ModelSpec, Recipe, UserError, rows_per_process

MAX_MICRO_BATCH_TOKENS_CPU = 1_024  # past it the caches of a CPU are too small
# For each pair of a row's tokens: transformers' mask, and the number that torch's attention adds to a score for it.
MASK_BYTES_CPU = 1 + 4


def plan_for_card(recipe: Recipe) -> Plan:
    """Plans for this machine's GPU, or for its CPU where the recipe allows that, and prints the plan.

    For several GPUs it plans for the smallest, and for references where a machine's Triton cannot launch kernels, with
    a line that says why. It downloads nothing but the config of a model that does not ship its config here.

    Raises UserError when the recipe needs a GPU that is not there, when one row does not fit, and as
    find_start_adapter.
    """
    find_start_adapter(recipe.lora, recipe.model, recipe.out)
    machine = this_machine()
    if recipe.card_gib is not None:
        require_gpu(recipe.model.name)
    print(f"machine: {machine}")
    if machine.is_gpu:
        plan = _plan_for_gpus(recipe, machine)
    else:
        warn_of_unused_gpu("training")
        plan = _plan_for_cpu(recipe, machine)
    plan = broadcast_from_main(plan)  # another process may count its own shards a few bytes smaller
    print(plan.text)
    return plan


def plan_for_examples(recipe: Recipe, plan: Plan, examples_per_row: int) -> Plan:
    """The plan for data with so many examples in the row that has the most, of pairs both answers.

    Where it was made for as many, that is the plan. Else it is made again for the same card and layout, and printed: as
    the model is loaded already, other layers may recompute, and micro-batches may be smaller. All processes call it.

    Raises UserError where then no row fits.
    """
    planned = plan.examples_per_row
    if planned is None or plan.card is None or examples_per_row <= planned:
        return plan
    setting = replace(_setting_of_all(this_machine(), recipe.model), examples_per_row=examples_per_row)
    planner = Planner(recipe, plan.card, setting, plan.layout)
    option = planner.choose_with(plan.layout.on_host)
    if option is None:
        raise UserError(explain_examples(planner, planned, plan.layout.on_host))
    plan = broadcast_from_main(make_plan(planner, option))
    print(f"planned again: a row of the data has {examples_per_row:,} examples, more than {planned:,}\n{plan.text}")
    return plan


def setting_of(machine: Machine, model: ModelSpec) -> Setting:
    """What a step of the model on this machine depends on.

    Says in a line when a GPU runs references in the place of kernels.
    """
    reason = why_no_triton() if machine.is_gpu else None
    if reason:
        say_references_run(reason)
    attention = attention_implementation(machine, load_config(model))
    return Setting(machine.dtype, attention, triton=machine.is_gpu and reason is None)


def setting_of_kind(gpu: KnownGpu, model: ModelSpec) -> Setting:
    """What a step of the model on a GPU of this kind depends on, where Triton can launch kernels."""
    return Setting(compute_dtype(gpu.capability)[0], attention_of(gpu.capability, load_config(model)))


def describe_kind(gpu: KnownGpu, model: ModelSpec) -> str:
    """One line: how this kind of GPU computes the model."""
    dtype, reason = compute_dtype(gpu.capability)
    has_flash = setting_of_kind(gpu, model).attention == PACKED_ATTENTION
    attention = "flash attention over packed rows" if has_flash else "attention with a mask (no flash attention)"
    version = ".".join(map(str, gpu.capability))
    return (
        f"{gpu.name}, compute capability {version}: computing in {str(dtype).removeprefix('torch.')} ({reason}), "
        f"{attention}"
    )


def _plan_for_gpus(recipe: Recipe, machine: Machine) -> Plan:
    setting = _setting_of_all(machine, recipe.model)
    cards = all_gather((Card.of_machine(machine), machine.dtype))
    return plan_on(recipe, smallest_of(cards), setting)


def _setting_of_all(machine: Machine, model: ModelSpec) -> Setting:
    """As setting_of, with references where a machine of the run cannot launch kernels."""
    setting = setting_of(machine, model)
    for reason in filter(None, all_gather(why_no_triton())):  # perhaps of another machine
        say_references_run(reason)
        setting = replace(setting, triton=False)
    return setting


def _plan_for_cpu(recipe: Recipe, machine: Machine) -> Plan:
    """The recipe's policy, and the largest micro-batch within MAX_MICRO_BATCH_TOKENS_CPU.

    Memory is not planned. Raises UserError where the mask of a row alone would not fit it.
    """
    refuse_more_positions(recipe)
    train, processes = recipe.train, world_size()
    refuse_weights_on_host(recipe)
    sharded, wanted = processes > 1 and train.sharding == "always", train.weights_on_host
    embedding = train.embedding_on_host is True
    layout = Layout(processes, sharded, 0 if sharded or wanted == "auto" else wanted, embedding)
    if layout.sharded:
        refuse_unshardable(recipe.lora, train)
    layers = load_config(recipe.model).num_hidden_layers
    policy = Policy.named("none" if train.checkpointing == "auto" else train.checkpointing, layers)
    limit = max(1, MAX_MICRO_BATCH_TOKENS_CPU // train.seq_len)
    here = rows_per_process(train, processes)
    rows = max(rows for rows in range(1, min(here, limit) + 1) if here % rows == 0)
    _refuse_large_mask(train.seq_len)
    why = f"on a CPU at most {MAX_MICRO_BATCH_TOKENS_CPU:,} tokens at a time ({machine.name})"
    plan = build_plan(train, layout, rows, policy, why)
    needs_reference = recipe.preference is not None and recipe.preference.needs_reference
    return replace(plan, reference_rows=limit if needs_reference else 0)


def _refuse_large_mask(seq_len: int) -> None:
    needed, ram = MASK_BYTES_CPU * seq_len**2, available_ram()
    if ram is not None and needed > ram // local_world_size():
        raise UserError(
            f"on a CPU attention has a mask of each row's tokens by its tokens: {needed / GIB:,.1f} GiB for "
            f"{seq_len:,} of them (TrainSpec.seq_len), and {ram // local_world_size() / GIB:,.1f} GiB of RAM are "
            "available. Lower TrainSpec.seq_len, or train on a GPU from the RTX 30 series on, which needs no mask"
        )
