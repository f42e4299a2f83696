import pytest
from gguf import MODEL_ARCH_NAMES

from common.model.architectures import ARCHITECTURES
from common.model.lean_layers import LEAN_CLASS_OF
from tests.conftest import ARCHITECTURES as TESTED
from tests.conftest import SMALL


def test_every_architecture_of_the_table_is_tested():
    assert ARCHITECTURES.keys() == TESTED.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda architecture: architecture.model_type)
def test_a_line_names_what_transformers_and_gguf_have(architecture):
    config_class, model_class = TESTED[architecture.model_type]
    model = model_class(config_class(**SMALL))
    assert model.config.model_type == architecture.model_type
    layer = model.model.layers[0]
    for part, module in (("DecoderLayer", layer), ("Attention", layer.self_attn), ("MLP", layer.mlp)):
        assert architecture.layer_class(part) is type(module)
        assert issubclass(LEAN_CLASS_OF[type(module)], type(module))
    assert architecture.gguf_name in MODEL_ARCH_NAMES.values()
