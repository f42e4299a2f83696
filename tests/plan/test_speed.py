"""How long the work of a segment takes."""

from dataclasses import replace

import pytest

from common.plan.speed import KNOWN_GPUS, Speed, Work, data_sheet_flops, named_gpu, speed_of
from common.recipe import UserError


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
    assert speed_of("an unknown card") is speed_of(None) is KNOWN_GPUS[0]


@pytest.mark.parametrize(
    ("typed", "name"),
    [("t4", "T4"), ("Tesla T4", "T4"), ("RTX-4090", "RTX 4090"), ("geforce_rtx 3090", "RTX 3090"), ("5090", "RTX 5090")]
    + [("l4", "L4"), ("L40S", "L40S"), ("nvidia a100", "A100"), (None, None), ("0", None), ("17", None)],
)
def test_a_kind_of_gpu_is_known_however_it_is_written_and_a_number_is_none(typed, name):
    known = named_gpu(typed)
    assert (known and known.name) == name


def test_an_unknown_kind_names_those_that_are_known():
    with pytest.raises(UserError, match=r"GPU=nonsense: a plan knows rtx-4090 \(23.5 GiB\), .*, t4 \(14.5 GiB\)"):
        named_gpu("nonsense")


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
    for speed in KNOWN_GPUS:
        if speed.name in names:
            assert speed.flops_per_second <= data_sheet_flops(names[speed.name])
