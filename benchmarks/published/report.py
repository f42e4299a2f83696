"""The tables of docs/published.md, from the results of benchmarks.published."""

from typing import Any


def memory_lines(results: dict[str, Any]) -> list[str]:
    """One line of Markdown for each published peak."""
    return [
        f"| {name} | {result['packages']['transformers']} | {result['published_bytes']:,} "
        f"| {result['predicted_bytes']:,} | {result['predicted_bytes'] / result['published_bytes']:.5f} "
        f"| {_rest(result)} | {result['peak_in']} |"
        for name, result in results["rows"].items()
        if result["published_bytes"]
    ]


def _rest(result: dict[str, Any]) -> str:
    """Bytes between two steps, predicted less published."""
    published = result["published_rest_bytes"]
    return f"{result['predicted_rest_bytes'] - published:+,}" if published else "–"


def speed_lines(results: dict[str, Any]) -> list[str]:
    """One line of Markdown for each published speed."""
    lines = []
    for name, result in results["rows"].items():
        for gpu, speed in result["speeds"].items():
            ratios = " | ".join(_ratio(seconds, speed) for seconds in speed["predicted_seconds"].values())
            lines.append(f"| {name} | {_short(gpu)} | {speed['published_seconds']:.2f} s | {ratios} |")
    return lines


def _ratio(seconds: float | None, speed: dict[str, Any]) -> str:
    return f"{seconds / speed['published_seconds']:.2f}" if seconds else "–"


def _short(gpu: str) -> str:
    return gpu.removeprefix("NVIDIA ").removeprefix("GeForce ")


def bias_lines(results: dict[str, Any]) -> list[str]:
    """One line of Markdown for each GPU: the range of the model's times over the published ones, and the middle."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for result in results["rows"].values():
        for gpu, speed in result["speeds"].items():
            of_gpu = ratios.setdefault(_short(gpu), {"data_sheet": [], "own": []})
            for kind, seconds in speed["predicted_seconds"].items():
                if seconds:
                    of_gpu[kind].append(seconds / speed["published_seconds"])
    return [
        f"| {gpu} | {len(of_gpu['data_sheet'])} | {_range(of_gpu['data_sheet'])} | {_range(of_gpu['own'])} |"
        for gpu, of_gpu in ratios.items()
    ]


def _range(ratios: list[float]) -> str:
    if not ratios:
        return "no speeds of it"
    ordered = sorted(ratios)
    return f"{ordered[0]:.2f} to {ordered[-1]:.2f}, middle {ordered[len(ordered) // 2]:.2f}"
