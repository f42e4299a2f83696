"""The report of a plan in JSON, for machines."""

import json
import re
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.machine.write_errors import writing
from common.model.activation_checkpointing import Policy
from common.plan.report import CHOICE, PlanReport

PLANNING_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")  # whose versions a plan depends on


def write_json(report: PlanReport, path: Path) -> None:
    """Writes the report. Raises UserError where it cannot be written."""
    with writing(path):
        path.write_text(json.dumps(_values(report), indent=2) + "\n", encoding="utf-8")


def _values(report: PlanReport) -> dict[str, Any]:
    card, plan, speed = report.card, report.plan, report.speed
    return {
        "recipe": asdict(report.recipe),
        "card": {
            "name": card.name,
            "size_bytes": card.size,
            "reserve_bytes": card.overhead()["reserve"],
            "unseen_bytes": {_key(name): size for name, size in card.overhead().items()},
            "budget_bytes": card.budget,
        },
        "choice": {
            "micro_batch_rows": plan.micro_batch_rows,
            "accumulation": plan.accumulation,
            "reference_rows": plan.reference_rows,
            **asdict(plan.layout),
            **_policy_values(plan.checkpointing),
            "predicted_peak_allocated_bytes": plan.peak_bytes,
            "predicted_peak_on_card_bytes": report.row(CHOICE).peak,
        },
        "table": [
            {
                "name": row.name,
                **_policy_values(row.policy),
                "peak_on_card_bytes": row.peak,
                "parts_bytes": {_key(kind): size for kind, size in row.parts.items()},
                "fits": row.fits,
                "streamed_layers": row.streamed,
                "embedding_on_host": row.embedding_on_host,
                "host_memory_bytes": row.step.host_peak(),
                "seconds_per_token": row.seconds_per_token,
                "relative_time_per_token": row.relative_time,
            }
            for row in report.rows
        ],
        "longest_rows": [
            {"name": name, "tokens": tokens, "host_memory_bytes": report.host_of_longest[name]}
            for name, tokens in report.longest.items()
        ],
        "model_positions_tokens": report.positions,
        "speed": {
            "name": speed.name,
            "matmul_flop_per_second": speed.flops_per_second,
            "memory_bytes_per_second": speed.memory_bytes_per_second,
            "matmul_efficiency": speed.matmul_efficiency,
            "memory_efficiency": speed.memory_efficiency,
            "host_link_bytes_per_second": speed.link_bytes_per_second,
            "launch_seconds": speed.launch_seconds,
        },
        "versions": {name: version(name) for name in PLANNING_LIBRARIES},
    }


def _policy_values(policy: Policy) -> dict[str, int | bool]:
    return {
        "kept_layers": policy.kept,
        "recomputed_layers": policy.recomputed,
        "keep_attention": policy.keep_attention,
        "offload": policy.offload,
        "tile_tokens": policy.tile,
        "by_head": policy.by_head,
        "qkv_again": policy.qkv_again,
    }


def _key(name: str) -> str:
    """A name as a key: "CUDA context" becomes "cuda_context"."""
    return re.sub(r"\W+", "_", name).lower()
