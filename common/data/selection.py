"""Which examples of the sources are trained on, and which are held out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common.data.examples import Examples, view
from common.data.hold_out import draw_held_out
from common.data.mixing import Mask, mix
from common.data.report import DataReport


class Selection(NamedTuple):
    """For each example, of all sources in turn, whether it is trained on, and whether it is held out."""

    trained: Mask
    held_out: Mask


def select(sources: Sequence[Examples], weights: Sequence[float], eval_rows: int, seed: int) -> Selection:
    """Mixes the sources by their weights, and holds out up to eval_rows examples of the mixture, at most a tenth."""
    rows = [source.document_count for source in sources]
    is_mixed = np.concatenate(mix(rows, weights, seed))
    documents = np.concatenate(
        [view(source.documents) + before for source, before in zip(sources, np.cumsum([0, *rows]), strict=False)]
    )
    numbers = np.repeat(np.arange(len(sources)), [len(source) for source in sources])
    trained = is_mixed[documents]
    count = min(eval_rows, int(trained.sum()) // 10)
    held_out = np.zeros_like(trained)
    if count:
        hashes = np.concatenate([source.prompt_view() for source in sources])
        held_out[trained] = draw_held_out(documents[trained], hashes[trained], numbers[trained], count, seed)
    return Selection(trained & ~held_out, held_out)


def describe_mixture(sources: Sequence[Examples], reports: Sequence[DataReport], selection: Selection) -> list[str]:
    """What the mixture takes of each source, as lines of the report. Notes it in the sources' reports too."""
    bounds = np.cumsum([0, *map(len, sources)])
    is_mixed = selection.trained | selection.held_out
    masks = [is_mixed[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    tokens = [int(source.trained_tokens()[mask].sum()) for source, mask in zip(sources, masks, strict=True)]
    parts, earlier = [], np.array([], dtype=np.uint64)
    for source, mask, trained, report in zip(sources, masks, tokens, reports, strict=True):
        hashes = np.unique(source.hash_view()[mask])
        report.mixed_copies = len(np.intersect1d(hashes, earlier, assume_unique=True))
        earlier = np.union1d(earlier, hashes)
        report.mixed = len(np.unique(view(source.documents)[mask]))
        report.mixed_share = trained / max(1, sum(tokens))
        rows = f"{report.mixed:,} of {report.kept:,} rows of {report.source}"
        parts.append(f"{rows}, {report.mixed_share:.0%} of the trained tokens")
    lines = [f"  mixed by weight: {'; '.join(parts)}"]
    if copies := sum(report.mixed_copies or 0 for report in reports):
        examples = "1 example is" if copies == 1 else f"{copies:,} examples are"
        lines.append(f"  {examples} in two of the sources, token for token")
    return lines
