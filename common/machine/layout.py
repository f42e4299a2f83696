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

    def __post_init__(self) -> None:
        if self.sharded and self.processes == 1:
            raise ValueError(f"no such layout: {self}")

    @property
    def streamed(self) -> int:
        """Layers whose frozen weights wait in host memory, and come to the card for their computation."""
        return 0 if self.sharded else self.on_host

    def streams(self, on_host: int) -> bool:
        """Whether so many layers on the host would be such."""
        return on_host > 0 and not self.sharded

    def __str__(self) -> str:
        if self.processes == 1:
            return "one process" + self._words_of_host("weights")
        if not self.sharded:
            whole = f"data parallel: each of {self.processes} cards has the whole model"
            return whole + self._words_of_host("weights")
        return f"layers sharded over {self.processes} cards (FSDP2){self._words_of_host('parts')}"

    def _words_of_host(self, what: str) -> str:
        layers = "1 layer" if self.on_host == 1 else f"{self.on_host} layers"
        return f", the {what} of {layers} in host memory" if self.on_host else ""


ONE_PROCESS = Layout()


def spread_layers(count: int, layers: int) -> list[int]:
    """The numbers of `count` of so many layers, spread evenly, so that one comes from the host while others compute."""
    return [index for index in range(layers) if (index + 1) * count // layers > index * count // layers]
