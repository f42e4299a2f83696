"""How a model lies over the processes of a run."""

from dataclasses import dataclass

# Of the ring on the card for layers whose weights stream (common.model.weight_streaming), each for a layer's weights.
RING_SLOTS = 2


@dataclass(frozen=True)
class Layout:
    """How a model lies over the processes of a run, one process a card."""

    processes: int = 1
    sharded: bool = False  # each card holds a shard of every decoder layer (FSDP2); otherwise the whole model (DDP)
    on_host: int = 0  # layers whose shards, or whose frozen weights where layers are whole, wait in host memory
    embedding_on_host: bool = False  # the embedding waits there, and the rows of a micro-batch's tokens are sent

    def __post_init__(self) -> None:
        if self.sharded and (self.processes == 1 or self.embedding_on_host):
            raise ValueError(f"no such layout: {self}")

    @property
    def streamed(self) -> int:
        """Layers whose frozen weights wait in host memory, and come to the card for their computation."""
        return 0 if self.sharded else self.on_host

    @property
    def waits(self) -> str:
        """What waits in host memory where layers are whole, in words; nothing where nothing does."""
        parts = [f"the weights of {_layers(self.streamed)}"] * bool(self.streamed)
        return " and ".join([*parts, *["the embedding"] * self.embedding_on_host])

    def streams(self, on_host: int) -> bool:
        """Whether so many layers on the host would be such."""
        return on_host > 0 and not self.sharded

    def __str__(self) -> str:
        if self.processes == 1:
            words, waits = "one process", self.waits
        elif not self.sharded:
            words, waits = f"data parallel: each of {self.processes} cards has the whole model", self.waits
        else:
            words = f"layers sharded over {self.processes} cards (FSDP2)"
            waits = f"the parts of {_layers(self.on_host)}" if self.on_host else ""
        return f"{words}, {waits} in host memory" if waits else words


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


ONE_PROCESS = Layout()


def spread_layers(count: int, layers: int) -> list[int]:
    """The numbers of `count` of so many layers, spread evenly, so that one comes from the host while others compute."""
    return [index for index in range(layers) if (index + 1) * count // layers > index * count // layers]
