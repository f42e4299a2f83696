"""The arithmetic of a step, by hand."""

from common.plan.speed import Speed
from common.plan.step import WORKING, lagrange_weights, peak_between
from tests.plan.steps_by_hand import by_hand, segment


def test_the_peak_is_the_worst_moment_not_the_worst_end():
    step = by_hand(
        segment("embedding", (5, "embedding"), host=3),
        segment("forward 0", (50, "forward 0"), (-50, "forward 0"), (7, "forward 0"), host=-1),
        segment("head and loss", (20, "head and loss"), (-20, "head and loss"), (-5, "embedding"), host=2),
    )
    assert sum(step.resident.values()) == 110
    assert step.peak() == 110 + 5 + 50
    assert step.at_peak() == step.resident | {WORKING: 55}
    assert step.host_peak() == 4
    assert [part.net for part in step.segments] == [5, 7, -5]


def test_a_micro_batch_bears_its_share_of_the_optimizers_update():
    """Which comes once a step: else small micro-batches would look slower than they are."""
    speed = Speed("a card", flops_per_second=1.0, memory_bytes_per_second=1.0)
    step = by_hand(segment("forward 0", seconds=5.0), segment("optimizer", seconds=8.0))
    assert step.seconds(speed) == 5 + 8
    assert step.seconds(speed, micro_batches=4) == 5 + 2


def test_three_counts_tell_a_parabola_and_two_a_straight_line():
    def step(tokens: int):
        return by_hand(
            segment("embedding", (tokens, "embedding")),
            segment("forward 0", (tokens**2, "forward 0"), (-(tokens**2), "forward 0")),
            segment("head and loss", (-tokens, "embedding")),
        )

    counted = (2, 3, 5)
    for tokens in (1, 2, 4, 9):
        assert peak_between([step(n) for n in counted], lagrange_weights(tokens, counted)) == step(tokens).peak()
    two = [step(n) for n in (2, 4)]
    assert peak_between(two, lagrange_weights(3, (2, 4))) == 110 + 3 + (2**2 + 4**2) // 2
