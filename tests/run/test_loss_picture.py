import json

import pytest
from matplotlib.image import imread

from common.run.loss_picture import draw_loss

STEPS = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)] + [{"step": 3, "eval_loss": 0.5}]
BLUE = (0x1F / 255, 0x77 / 255, 0xB4 / 255)  # tab:blue


def picture(folder, entries):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    draw_loss(folder)
    return imread(folder / "loss.png")[..., :3]


def blue_pixels(image):
    return int((abs(image - BLUE).max(axis=-1) < 0.02).sum())


@pytest.mark.filterwarnings("ignore:Glyph")  # as quiet_libraries does: the font has no kanji
@pytest.mark.parametrize("name", ["run $5_$6 {x", r"\frac{1}{", "$", "a_b^c%", "試験 🙂", "x" * 200])
def test_a_name_is_no_formula(tmp_path, name):
    assert picture(tmp_path / name, STEPS).shape == (540, 960, 3)


def test_a_single_step_is_a_dot(tmp_path):
    legend_alone = blue_pixels(picture(tmp_path / "none", STEPS[3:]))
    assert legend_alone == 0
    line_in_legend = 40  # pixels, about
    assert blue_pixels(picture(tmp_path / "one", STEPS[:1])) > line_in_legend + 20
