"""Says that rows are of another kind than a recipe learns from (DataSpec.kind), and which recipe is the right one."""

from collections.abc import Iterable

from common.sources.source_row import OtherKind


def has_pairs(keys: Iterable[str], *, rated: bool) -> OtherKind:
    """keys: by which it is known. rated: whether the recipe learns from rated answers, and not from conversations."""
    found = f"it has {' and '.join(map(repr, keys))}, as DPO takes them"
    if rated:
        return OtherKind(
            f"these are pairs of a better and a worse answer ({found}), and PreferenceSpec('kto') learns from single "
            "answers with a label, true or false: take PreferenceSpec('dpo'), as MODEL=tiny-dpo and llama3-8b-dpo do"
        )
    return _refused_for_conversations(found, "dpo")


def has_rating(key: str) -> OtherKind:
    return _refused_for_conversations(f"{key!r} is true or false, as KTO takes it", "kto")


def _refused_for_conversations(found: str, loss: str) -> OtherKind:
    others = "" if loss == "dpo" else f" with loss={loss!r}"
    return OtherKind(
        f"this is preference data ({found}), and this recipe learns every answer, the worse ones too: take a recipe "
        f"for it, MODEL=tiny-dpo or llama3-8b-dpo{others}, or add preference=PreferenceSpec({loss!r}) to this one; or "
        "keep the better answers alone, as messages or as prompt and completion"
    )


def is_no_pair(format_name: str, label: str | None) -> OtherKind:
    """label: the key of a rating, where there is one."""
    if label is not None:
        return OtherKind(
            f"these are single answers with {label!r} ({format_name}), and this recipe learns from pairs of a better "
            "and a worse answer: for single answers that are rated, set preference=PreferenceSpec('kto')"
        )
    return OtherKind(
        f"these are conversations ({format_name}), and this recipe learns from pairs of a better and a worse answer: "
        "take a recipe without PreferenceSpec(...), as MODEL=tiny and llama3-8b are, or give pairs, with prompt, "
        "chosen and rejected"
    )


def has_no_rating(format_name: str) -> OtherKind:
    return OtherKind(
        f"these are conversations without a label ({format_name}), and PreferenceSpec('kto') learns from answers that "
        "are rated: add a label to each row, true or false, or take a recipe without PreferenceSpec(...), as "
        "MODEL=tiny and llama3-8b are"
    )
