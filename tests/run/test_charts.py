import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from common.run.charts import HEIGHT, LEFT, MAX_POINTS, RIGHT, TOP, WIDTH, Curve, decades, line_chart, thinned, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (1, 194, [0, 50, 100, 150, 200]),
        (0.0, 0.0002, [0, 0.00005, 0.0001, 0.00015, 0.0002]),
        (3, 3, [3, 4, 5, 6]),
        (-1.5, 1.5, [-2, -1, 0, 1, 2]),
    ],
)
def test_ticks_are_round_and_reach_both_ends(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_decades_reach_both_ends():
    assert decades(0.04, 5.5) == pytest.approx([0.01, 0.1, 1, 10])


def points_of(svg: str, style: str) -> list[tuple[float, float]]:
    line = re.search(rf'<polyline class="{style}" points="([^"]*)"', svg).group(1)
    return [tuple(map(float, pair.split(","))) for pair in line.split()]


def test_a_curve_fills_its_room_and_keeps_its_shape():
    svg = line_chart("t", "x", [Curve("a", [(0, 0), (5, 10), (10, 0)], "training")])
    ElementTree.fromstring(svg)
    (x0, y0), (x1, y1), (x2, y2) = points_of(svg, "training")
    assert (x0, x2, y1) == (LEFT, WIDTH - RIGHT, TOP)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y0 == y2 > y1
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in ((x0, y0), (x1, y1), (x2, y2)))


def test_values_far_apart_are_drawn_on_a_logarithmic_scale():
    halving = [(step, 8 / 2**step) for step in range(8)]
    ys = [y for _, y in points_of(line_chart("t", "x", [Curve("a", halving, "a")], from_zero=False), "a")]
    assert [b - a for a, b in zip(ys, ys[1:], strict=False)] == pytest.approx([ys[1] - ys[0]] * 7, abs=0.2)
    near = [(0, 1.5), (1, 1.25), (2, 1.0)]
    ys = [y for _, y in points_of(line_chart("t", "x", [Curve("a", near, "a")], from_zero=False), "a")]
    assert ys[0] == TOP and ys[1] == pytest.approx((ys[0] + ys[2]) / 2, abs=0.1)


def test_dots_say_their_value_and_text_is_escaped():
    svg = line_chart("<b>", "x & y", [Curve("held <out>", [(0, 1.23456)], "held-out", dots=True)])
    ElementTree.fromstring(svg)
    assert "<title>held &lt;out&gt;, 0: 1.235</title>" in svg and "x &amp; y" in svg


def test_many_points_become_means_and_odd_ones_are_left_out():
    many = [(float(n), float(n)) for n in range(10 * MAX_POINTS + 3)]
    assert len(thinned(many)) <= MAX_POINTS
    assert thinned(many)[0] == (5.0, 5.0)
    assert thinned([]) == []
    assert line_chart("t", "x", [Curve("a", [(0, math.nan), (1, math.inf)], "a")]) == ""
    assert line_chart("t", "x", []) == ""


def test_a_curve_of_one_point_is_a_dot():
    assert "<circle" in line_chart("loss", "step", [Curve("training", [(1, 2.0)], "training")])
    assert "<circle" not in line_chart("loss", "step", [Curve("training", [(1, 2.0), (2, 1.0)], "training")])
