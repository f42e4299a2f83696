"""A chat template that writes today's date writes one date in a run, also when the run goes on the next day."""

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from common.cli import run_command
from common.model.loading import load_tokenizer
from common.recipe import ModelSpec
from common.run.run_date import with_run_date
from common.run.training import train
from tests.conftest import TINY
from tests.run.test_training import prepare

EVENING = datetime(2026, 11, 27, 23, 59)


@pytest.fixture
def dated(recipe, tmp_path):
    """A recipe whose template begins with today's date."""
    today = "{{ bos_token + '<|system|>' + strftime_now('%d %b %Y') + '<|end|>' }}"
    template = (TINY / "chat_template.jinja").read_text().replace("{{- bos_token -}}", today)
    (tmp_path / "dated.jinja").write_text(template)
    return replace(
        recipe,
        model=replace(recipe.model, chat_template=str(tmp_path / "dated.jinja")),
        train=replace(recipe.train, save_every=1, sample_answers=0),
    )


def finetune(recipe, *flags: str) -> int:
    return run_command("finetune", "dated", recipe, ["--out", recipe.out, *flags], lambda given: train(*prepare(given)))


def test_a_run_goes_on_the_next_day_with_its_own_date(dated, clock, capsys):
    clock(EVENING)
    assert finetune(dated, "--max-steps", "1") == 0
    clock(EVENING + timedelta(days=1))
    assert finetune(dated, "--max-steps", "2", "--resume") == 0, capsys.readouterr().err
    template = load_tokenizer(ModelSpec(dated.out), dated.model).chat_template
    assert "27 Nov 2026" in template
    assert "28 Nov 2026" not in template


def test_a_run_that_begins_anew_takes_the_new_day(dated, clock):
    clock(EVENING)
    assert finetune(dated, "--max-steps", "1") == 0
    clock(EVENING + timedelta(days=1))
    assert finetune(dated, "--max-steps", "1", "--overwrite") == 0
    assert "28 Nov 2026" in load_tokenizer(ModelSpec(dated.out), dated.model).chat_template


def test_a_run_asks_for_the_date_once(dated, clock):
    clock(EVENING)
    begun = with_run_date(dated)
    clock(EVENING + timedelta(minutes=2))
    assert begun.model.template_date == "2026-11-27"
    assert with_run_date(begun) == begun
    assert "27 Nov 2026" in load_tokenizer(begun.model).chat_template


def test_another_date_in_the_recipe_is_another_run(dated, clock, capsys):
    clock(EVENING)
    assert finetune(dated, "--max-steps", "1") == 0
    other = replace(dated, model=replace(dated.model, template_date="2020-01-01"))
    assert finetune(other, "--max-steps", "2", "--resume") == 2
    assert "ModelSpec.template_date was '2026-11-27' and is '2020-01-01'" in capsys.readouterr().err


@pytest.mark.parametrize("manifest", ["", "{}", '{"run": {"recipe": null}}', '{"run": []}'])
def test_where_no_checkpoint_tells_the_date_it_is_todays(dated, clock, tmp_path, manifest):
    clock(EVENING)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(manifest)
    assert with_run_date(replace(dated, existing_run="resume")).model.template_date == "2026-11-27"


def test_a_run_of_an_earlier_version_stays_without_a_date(dated, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"run": {"recipe": {}}}')
    assert with_run_date(replace(dated, existing_run="resume")).model.template_date is None
