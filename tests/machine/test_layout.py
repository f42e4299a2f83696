import pytest

from common.machine.layout import Layout


def test_layouts_in_words():
    assert str(Layout()) == "one process"
    assert str(Layout(2)) == "data parallel: each of 2 cards has the whole model"
    assert str(Layout(2, sharded=True, on_host=3)) == (
        "layers sharded over 2 cards (FSDP2), the parts of 3 layers in host memory"
    )
    for values in ({"on_host": 1}, {"sharded": True}, {"processes": 2, "on_host": 1}):
        with pytest.raises(ValueError, match="no such layout"):
            Layout(**values)
