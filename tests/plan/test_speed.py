"""How long the work of a segment takes."""

from dataclasses import replace

from common.plan.speed import SPEEDS, Speed, Work, speed_of


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
