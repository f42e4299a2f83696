import pytest

from common.machine.layout import Layout, spread_layers


def test_layouts_in_words():
    assert str(Layout()) == "one process"
    assert str(Layout(2)) == "data parallel: each of 2 cards has the whole model"
    assert str(Layout(2, sharded=True, on_host=3)) == (
        "layers sharded over 2 cards (FSDP2), the parts of 3 layers in host memory"
    )
    assert str(Layout(on_host=3)) == "one process, the weights of 3 layers in host memory"
    assert str(Layout(2, on_host=1)) == (
        "data parallel: each of 2 cards has the whole model, the weights of 1 layer in host memory"
    )
    with pytest.raises(ValueError, match="no such layout"):
        Layout(sharded=True)


def test_layers_on_the_host_are_spread():
    assert spread_layers(0, 6) == []
    assert spread_layers(2, 6) == [2, 5]
    assert spread_layers(3, 5) == [1, 3, 4]
    assert spread_layers(6, 6) == list(range(6))
