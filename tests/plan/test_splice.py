"""A deep step from the layers of a shallow one."""

from common.plan.splice import Part, layers_to_copy, splice_layers
from common.plan.step import WEIGHTS
from tests.plan.steps_by_hand import by_hand, segment


def test_a_spliced_step_repeats_what_a_layer_does_and_leaves_behind():
    one = by_hand(
        segment("embedding", (5, "embedding")),
        segment("forward 0", (7, "forward 0"), (2, "forward 0")),
        segment("head and loss", (-2, "forward 0")),
        segment("loss"),
        segment("backward 0", (-7, "forward 0")),
        segment("optimizer", (-5, "embedding"), seconds=4.0),
    )
    three = splice_layers([Part(one, [0, 0, 0])])
    assert three.resident[WEIGHTS] == 100 + 3 * 10
    assert three.peak() == 130 + 5 + 3 * 9
    assert sum(part.net for part in three.segments) == 0
    assert three.segment("optimizer").work.flops == 3 * 4.0


def test_which_layers_are_copied():
    assert layers_to_copy(6, 3, 1) == [0, 1, 1, 1, 1, 2]
    assert layers_to_copy(6, 4, 2) == [0, 1, 2, 2, 2, 3]
    assert layers_to_copy(3, 3, 1) == [0, 1, 2]
    assert layers_to_copy(1, 3, 1) == [2]
