"""The planners of this folder's tests share their counts, which take most of the time."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest

from common.plan import planner
from common.plan.forecast import Forecast

_forecast = cache(Forecast)


def _shared_forecast(recipe, *arguments) -> Forecast:
    """A forecast that all recipes share whose steps are the same."""
    train = replace(recipe.train, checkpointing="auto", rows_per_step=16, sharding="auto")  # no count depends on them
    return _forecast(replace(recipe, train=train), *arguments)


@pytest.fixture(scope="session", autouse=True)
def share_counts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "Forecast", _shared_forecast)
        yield
