"""From a recipe and a card to a plan: the choice between whole and sharded models, and the plan in words."""

from dataclasses import dataclass, replace

from common.machine.device import GIB
from common.machine.layout import Layout
from common.machine.processes import world_size
from common.model.activation_checkpointing import Policy
from common.model.sharding import refuse_unshardable
from common.plan.card import WORKSPACE_BYTES, Card
from common.plan.forecast import Setting
from common.plan.misfit import choose_or_explain
from common.plan.planner import TIME_TOLERANCE, Option, Planner
from common.plan.step import GATHERED, OPTIMIZER, Step
from common.recipe import Recipe, TrainSpec, UserError, rows_per_process


@dataclass(frozen=True)
class Plan:
    """How one optimizer step runs."""

    micro_batch_rows: int
    accumulation: int  # micro-batches of each process
    layout: Layout
    checkpointing: Policy
    text: str  # for people
    peak_bytes: int | None = None  # predicted, as torch.cuda.max_memory_allocated counts; None on a CPU
    optimizer_bytes: int = 0  # of the optimizer's states
    # Of a micro-batch of the pass that gives the reference's log-likelihoods, without gradients; 0 where there is none.
    reference_rows: int = 0
    card: Card | None = None  # that it was made for; None on a CPU
    examples_per_row: int | None = None  # that a row may have; None where the memory does not depend on that

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch_rows * self.accumulation * self.layout.processes

    def with_rows_per_step(self, rows_per_step: int) -> "Plan":
        """The plan for fewer rows a step: micro-batches no larger than here, so that its memory is the most it takes.

        rows_per_step: a multiple of the processes.
        """
        here = rows_per_step // self.layout.processes
        rows = max(rows for rows in range(1, min(here, self.micro_batch_rows) + 1) if here % rows == 0)
        each = f" on each of {self.layout.processes} processes" if self.layout.processes > 1 else ""
        split = f"{_row_or_rows_of(rows_per_step)} a step, {_micro_batches(here // rows, rows)}{each}"
        text = f"{self.text}\n  settled by the data: {split}; the peak is that of the plan at most"
        return replace(self, micro_batch_rows=rows, accumulation=here // rows, text=text)


def plan_on(recipe: Recipe, card: Card, setting: Setting | None = None) -> Plan:
    """The plan for a card, real or assumed, in each process of this run. Raises UserError as choose_option."""
    return make_plan(*choose_option(recipe, card, setting, world_size()))


def choose_option(recipe: Recipe, card: Card, setting: Setting | None, processes: int) -> tuple[Planner, Option]:
    """The fastest option that fits: with the whole model on each card where that fits. Otherwise each card streams the
    weights of whole layers from host memory, or the layers are sharded over the cards, whichever is faster.

    Raises UserError when one row does not fit, and where the model must be sharded and the recipe asks for something
    that cannot be.
    """
    train, whole, streamed = recipe.train, None, None
    if processes == 1 or train.sharding != "always":
        whole = Planner(recipe, card, setting, Layout(processes))
        moved = train.weights_on_host not in ("auto", 0) or train.embedding_on_host is True
        if processes == 1 or train.sharding == "never" or moved:
            return whole, choose_or_explain(whole)
        if option := whole.choose(streams=False):
            return whole, option
        streamed = whole.choose() if train.weights_on_host == "auto" else None
    try:
        refuse_unshardable(recipe.lora, train)
    except UserError as error:
        if whole is None or streamed is None:
            raise
        return whole, replace(streamed, instead=f"layers that are sharded over the cards are no choice: {error}")
    shared = Planner(recipe, card, setting, Layout(processes, sharded=True))
    if whole is None or streamed is None:
        return shared, choose_or_explain(shared)
    return _faster(whole, streamed, shared, shared.choose())


def _faster(whole: Planner, streamed: Option, shared: Planner, parts: Option | None) -> tuple[Planner, Option]:
    """Whole layers that stream, or layers sharded over the cards: the faster one, with a line that says why.

    Where the model of time cannot tell them apart, layers stay whole: no card waits for another one inside a layer.
    """
    if parts is None:
        return whole, replace(streamed, instead="sharded over the cards (FSDP2) it would not fit")
    seconds = [option.seconds_per_token * whole.seq_len * whole.rows_here for option in (streamed, parts)]
    times = (
        f"whole layers that stream: {seconds[0]:.1f} s a step and {streamed.host_bytes / GIB:.1f} GiB of host memory "
        f"for each card; sharded over the cards (FSDP2): {seconds[1]:.1f} s and {parts.host_bytes / GIB:.1f} GiB"
    )
    links = "modelled, each card with a link of its own to the host and to other cards, and no NVLink"
    if parts.seconds_per_token * TIME_TOLERANCE < streamed.seconds_per_token:
        return shared, replace(parts, instead=f"{times}; the parts are faster ({links})")
    why = "streaming is faster"
    if streamed.seconds_per_token * TIME_TOLERANCE >= parts.seconds_per_token:
        why = "as fast, so layers stay whole: no card waits for another one inside a layer"
    return whole, replace(streamed, instead=f"{times}; {why} ({links})")


def fits_whole(recipe: Recipe, card: Card, processes: int) -> bool:
    """Whether each of so many cards of this size can hold the whole model."""
    try:
        return Planner(recipe, card, None, Layout(processes)).choose(streams=False) is not None
    except UserError:  # the recipe cannot be planned at all
        return False


def make_plan(planner: Planner, option: Option) -> Plan:
    """The option as a plan, with its words."""
    planner = planner.with_embedding(on_host=option.embedding_on_host)
    card, policy = planner.card, option.policy
    layout = replace(planner.layout, on_host=option.on_host)
    _, step = planner.exact(option.rows, policy, option.on_host)
    keep = "1 layer keeps its" if policy.kept == 1 else f"{policy.kept} layers keep their"
    kept = f"; {keep} activations" if policy.kept and policy.recomputed else ""
    each = " for each card" if layout.processes > 1 else ""
    host = f"; {step.host_peak() / GIB:.1f} GiB in host memory{each}" if step.host_peak() else ""
    why = (
        f"predicted peak {(option.peak + WORKSPACE_BYTES) / GIB:.1f} GiB allocated, "
        f"{(option.peak + card.overhead_bytes) / GIB:.1f} GiB of {card.name} with what a count cannot see{kept}{host}"
    )
    if layout.sharded:
        why += f"\n  {_words_of_shards(step, layout, card.other_stream_bytes)}"
    if layout.streamed:
        why += f"\n  {_words_of_streaming(planner, option)}"
    if layout.embedding_on_host:
        why += f"\n  {_words_of_embedding(planner, option)}"
    why += f"\n  {option.instead}" if option.instead else ""
    here, more = planner.rows_here, option.rows + 1
    if here % more and more < here and planner.fits(planner.interpolate(more, policy, option.on_host)):
        why += f"\n  {more} rows at a time would fit too, but {here} rows cannot be split evenly into parts of {more}"
    peak_bytes, optimizer_bytes = option.peak + WORKSPACE_BYTES, step.resident[OPTIMIZER]
    reference_rows = planner.reference_rows(option.on_host)
    if reference_rows:
        why += f"\n  {_words_of_passes(planner, option, reference_rows)}"
    if planner.forecast.packs:
        why += f"\n  {_words_of_examples(planner)}"
    plan = build_plan(planner.recipe.train, layout, option.rows, policy, why, peak_bytes, optimizer_bytes)
    examples = planner.forecast.examples_per_row if planner.forecast.packs else None
    return replace(plan, reference_rows=reference_rows, card=card, examples_per_row=examples)


def _words_of_passes(planner: Planner, option: Option, rows: int) -> str:
    """What a loss with a reference computes without gradients, and the share of it in the time of the run."""
    peak = planner.forward_peak(rows, option.on_host, option.policy) + WORKSPACE_BYTES
    share = planner.pass_seconds_per_token(option.on_host) / option.seconds_per_token
    each_step = ", and before each step those of answers to other prompts" * (planner.recipe.data.kind == "rated")
    return (
        f"before the first step the log-likelihoods under the reference, {_row_or_rows_of(rows)} at a time, "
        f"{peak / GIB:.1f} GiB{each_step}: {share:.0%} of the modelled time of the run"
    )


def _words_of_examples(planner: Planner) -> str:
    """For how many examples in a row attention's scratch memory is counted."""
    examples = planner.forecast.examples_per_row
    counted = f"counted for rows of {'one example' if examples == 1 else f'up to {examples:,} examples'}"
    if planner.forecast.setting.examples_per_row is not None:
        return f"{counted}, as the data have"
    return f"{counted}; a run counts again where its data have more in a row"


def _words_of_shards(step: Step, layout: Layout, other_stream_bytes: int) -> str:
    """What one of the cards that share a model holds."""
    shards = (step.layers - layout.on_host) * sum(step.sharded_per_layer.values())
    gathered = max(now[GATHERED] for _, now in step.timeline())
    unsharded = sum(step.resident.values()) - step.resident[GATHERED] - shards
    return (
        f"on each card {shards / GIB:.1f} GiB of parts (weights, adapters, gradients, optimizer), "
        f"{unsharded / GIB:.1f} GiB whole (embedding, head, norm, scales), at most {gathered / GIB:.1f} GiB of layers "
        f"gathered, the next one early; {other_stream_bytes / GIB:.1f} GiB set aside for one in another stream's memory"
    )


def _words_of_streaming(planner: Planner, option: Option) -> str:
    """What crosses the link for layers whose weights stream, and what that costs by the model of time."""
    on_card, step = planner.exact(option.rows, option.policy)
    _, streamed = planner.exact(option.rows, option.policy, option.on_host)
    sent, speed = streamed.link_bytes() - step.link_bytes(), planner.forecast.speed
    slower = option.seconds_per_token / on_card.seconds_per_token - 1
    beside, tokens = sent / speed.link_bytes_per_second, option.rows * planner.seq_len
    hidden = "hidden behind computing" if slower < 0.0005 else f"which makes a step {slower:.1%} longer"
    shared = f", once for the {planner.card.cards} cards of a machine" if planner.card.cards > 1 else ""
    return (
        f"the weights of {option.on_host} of {planner.layers} layers wait in host memory{shared}, two at a time are on "
        f"the card: {sent / GIB:.1f} GiB cross the link in a micro-batch, {beside:.2f} s beside "
        f"{tokens * on_card.seconds_per_token:.2f} s, {hidden} (modelled)"
    )


def _words_of_embedding(planner: Planner, option: Option) -> str:
    forecast = planner.forecast
    sent = option.rows * planner.seq_len * forecast.embedding_row_bytes
    return (
        f"the embedding waits in host memory ({forecast.embedding_bytes / GIB:.2f} GiB): the host looks up a row for "
        f"each token of a micro-batch, and {sent / 2**20:.0f} MiB cross the link, "
        f"{1e3 * sent / forecast.speed.link_bytes_per_second:.1f} ms (modelled)"
    )


def build_plan(
    train: TrainSpec,
    layout: Layout,
    rows: int,
    policy: Policy,
    why: str,
    peak_bytes: int | None = None,
    optimizer_bytes: int = 0,
) -> Plan:
    """A plan and its text. rows: of a micro-batch. why: the lines of the text after the first."""
    accumulation = rows_per_process(train, layout.processes) // rows
    at_most = "up to " if train.rows_per_step == "auto" else ""
    shared, how = "", ""
    if layout.processes > 1:
        shared, how = f" on each of {layout.processes} processes", f"\n  {layout}"
    elif layout.streamed:
        rows_too = ", and the rows of the embedding" * layout.embedding_on_host
        how = f"; the weights of {layout.streamed} layers stream from host memory{rows_too}"
    elif layout.embedding_on_host:
        how = "; the rows of the embedding come from host memory"
    text = (
        f"plan: {at_most}{_row_or_rows_of(train.most_rows_per_step)} of {train.seq_len:,} tokens per optimizer step: "
        f"{_micro_batches(accumulation, rows)}{shared}; {policy}{how}\n  {why}"
    )
    return Plan(rows, accumulation, layout, policy, text, peak_bytes, optimizer_bytes)


def _micro_batches(count: int, rows: int) -> str:
    micro_batches = "1 micro-batch" if count == 1 else f"{count} micro-batches"
    return f"{micro_batches} of {_row_or_rows_of(rows)}"


def _row_or_rows_of(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
