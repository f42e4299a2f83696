"""The plan of a run: for the GPUs of the machine that it runs on, or for its CPU."""

from dataclasses import replace

from common.kernels import say_references_run
from common.kernels.triton_check import why_no_triton
from common.machine.collectives import all_gather, broadcast_from_main
from common.machine.device import Machine, compute_dtype, require_gpu, this_machine, warn_of_unused_gpu
from common.machine.layout import Layout
from common.machine.processes import world_size
from common.model.activation_checkpointing import Policy
from common.model.attention import PACKED_ATTENTION, attention_implementation, attention_of
from common.model.config import load_config, refuse_more_positions
from common.model.sharding import refuse_unshardable
from common.model.start_adapter import find_start_adapter
from common.plan.card import Card, smallest_of
from common.plan.forecast import Setting
from common.plan.plan import Plan, build_plan, plan_on
from common.plan.planner import refuse_weights_on_host
from common.plan.speed import KnownGpu
from common.recipe import Recipe, rows_per_process

MAX_MICRO_BATCH_TOKENS_CPU = 1_024  # past it the caches of a CPU are too small


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


def setting_of(machine: Machine) -> Setting:
    """What a step on this machine depends on. Says in a line when a GPU runs references in the place of kernels."""
    reason = why_no_triton() if machine.is_gpu else None
    if reason:
        say_references_run(reason)
    return Setting(machine.dtype, attention_implementation(machine), triton=machine.is_gpu and reason is None)


def setting_of_kind(gpu: KnownGpu) -> Setting:
    """What a step on a GPU of this kind depends on, where Triton can launch kernels."""
    return Setting(compute_dtype(gpu.capability)[0], attention_of(gpu.capability))


def describe_kind(gpu: KnownGpu) -> str:
    """One line: how this kind of GPU computes."""
    dtype, reason = compute_dtype(gpu.capability)
    has_flash = attention_of(gpu.capability) == PACKED_ATTENTION
    attention = "flash attention over packed rows" if has_flash else "attention with a mask (no flash attention)"
    version = ".".join(map(str, gpu.capability))
    return (
        f"{gpu.name}, compute capability {version}: computing in {str(dtype).removeprefix('torch.')} ({reason}), "
        f"{attention}"
    )


def _plan_for_gpus(recipe: Recipe, machine: Machine) -> Plan:
    setting = setting_of(machine)
    cards = all_gather((Card.of_machine(machine), machine.dtype, why_no_triton()))
    for reason in (reason for *_, reason in cards if reason):  # perhaps of another machine
        say_references_run(reason)
        setting = replace(setting, triton=False)
    return plan_on(recipe, smallest_of([(card, dtype) for card, dtype, _ in cards]), setting)


def _plan_for_cpu(recipe: Recipe, machine: Machine) -> Plan:
    """The recipe's policy, and the largest micro-batch within MAX_MICRO_BATCH_TOKENS_CPU; memory is not planned."""
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
    why = f"on a CPU at most {MAX_MICRO_BATCH_TOKENS_CPU:,} tokens at a time ({machine.name})"
    plan = build_plan(train, layout, rows, policy, why)
    needs_reference = recipe.preference is not None and recipe.preference.needs_reference
    return replace(plan, reference_rows=limit if needs_reference else 0)
