"""How long the work of a segment takes."""

from dataclasses import replace

import pytest

from common.plan.speed import SPEEDS, Speed, Work, data_sheet_flops, speed_of


def test_an_operator_takes_as_long_as_its_slower_side_and_copies_and_launches_go_beside():
    speed = Speed(
        "a card", flops_per_second=100.0, memory_bytes_per_second=10.0, link_bytes_per_second=2.0, launch_seconds=0.5
    )
    assert speed.seconds(Work([(300.0, 10.0), (100.0, 50.0)])) == 3 + 5
    assert speed.seconds(Work([(300.0, 10.0)], link_bytes=10.0)) == 5
    assert speed.seconds(Work([(300.0, 10.0)], launches=8)) == 4
    half = replace(speed, matmul_efficiency=0.5, memory_efficiency=0.25)
    assert half.seconds(Work([(300.0, 10.0), (100.0, 50.0)])) == 6 + 20
    assert Work([(300.0, 10.0)], 4.0, 8).scaled(0.5).operators == [(150.0, 5.0)]
    assert Work([(300.0, 10.0), (1.0, 1.0)]).flops == 301.0


def test_a_gpu_is_known_by_its_name_and_an_unknown_one_is_the_first():
    for name in ("H200", "A100", "L4", "L40S", "T4"):
        assert speed_of(f"NVIDIA {name}").name == name  # and L40S is no L4
    assert speed_of("NVIDIA A100-SXM4-80GB").name == "A100"
    assert speed_of("NVIDIA GeForce RTX 3090 Ti").name == "RTX 3090"
    assert speed_of("an unknown card") is speed_of(None) is SPEEDS[0]


@pytest.mark.parametrize(
    ("gpu", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),  # another chip
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),  # a part of a card
        ("NVIDIA L40", None),
    ],
)
def test_the_data_sheet_is_that_of_this_very_card(gpu, teraflops):
    assert data_sheet_flops(gpu) == (None if teraflops is None else teraflops * 1e12)


def test_no_card_is_planned_to_be_faster_than_its_data_sheet():
    names = {"RTX 4090": "NVIDIA GeForce RTX 4090", "RTX 3090": "NVIDIA GeForce RTX 3090", "H200": "NVIDIA H200"}
    for speed in SPEEDS:
        if speed.name in names:
            assert speed.flops_per_second <= data_sheet_flops(names[speed.name])
