"""How a model lies over the processes of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How a model lies over the processes of a run, one process a card."""

    processes: int = 1
    sharded: bool = False  # each card holds a shard of every decoder layer (FSDP2); otherwise the whole model (DDP)
    on_host: int = 0  # layers whose shards stay in host memory

    def __post_init__(self) -> None:
        if self.on_host and not self.sharded or self.sharded and self.processes == 1:
            raise ValueError(f"no such layout: {self}")

    def __str__(self) -> str:
        if self.processes == 1:
            return "one process"
        if not self.sharded:
            return f"data parallel: each of {self.processes} cards has the whole model"
        layers = "1 layer" if self.on_host == 1 else f"{self.on_host} layers"
        host = f", the parts of {layers} in host memory" if self.on_host else ""
        return f"layers sharded over {self.processes} cards (FSDP2){host}"


ONE_PROCESS = Layout()
