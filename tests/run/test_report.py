"""The page of a run: what it says, and what a reader sees of it in a browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from common.cli import run_command
from common.recipe import UserError
from common.run.folder import prepare_run_folder
from common.run.report import write_report
from recipes.tiny import RECIPE
from tests.machine.test_lock import held_by_another

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars"
# A page that looks at another one in a frame as wide as a phone, and tells how wide its content is.
LOOK = """<body><iframe src="{url}" style="width:{width}px;height:3000px;border:0"></iframe>
<script>onload = () => {{ const d = document.querySelector("iframe").contentDocument;
document.title = "w" + d.documentElement.scrollWidth + " s" + d.querySelectorAll("svg polyline").length; }}</script>"""


@pytest.fixture
def folder(finetuned, tmp_path) -> Path:
    """A copy of the small model's run, to be changed."""
    shutil.copytree(finetuned[1], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "eval.json"))
    return tmp_path / "run"


def page(folder: Path, **changes: object) -> str:
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return write_report(folder).read_text()


def words(html: str) -> str:
    """The text of a page, as one line."""
    body = html.split("<body>")[1]
    return " ".join(re.sub(r"<[^>]+>", " ", body).replace("&nbsp;", " ").split())


def browse(url: str, *flags: str, folder: Path) -> str:
    command = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", *flags, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium); .ci/run installs it"
)


@needs_chromium
def test_a_reader_sees_the_run(folder):
    """The page as Chromium lays it out, without network; a screenshot of it for whoever wants to look."""
    dom = browse(f"file://{folder}/report.html", "--dump-dom", folder=folder)
    text = words(dom)
    assert "models/tiny, fine-tuned on data/tiny/train.jsonl" in text
    assert re.search(r"held-out loss 5\.5\d\d → 0\.0\d\d", text)
    assert re.search(r"194 optimizer steps, 18\d,\d{3} tokens", text)
    assert '{"tool":' in text and "as in the data, to the letter" in text
    assert "LoRA, rank 16, alpha 32, 217,088 parameters" in text
    assert "make finetune MODEL=tiny" in text and "transformers" in text
    shot = folder / "report.png"
    browse(f"file://{folder}/report.html", "--window-size=1100,2400", f"--screenshot={shot}", folder=folder)
    assert shot.read_bytes().startswith(b"\x89PNG") and shot.stat().st_size > 50_000


@needs_chromium
@pytest.mark.parametrize("width", [360, 800, 1200])
def test_nothing_is_wider_than_the_screen(folder, width):
    path = folder / "run.json"
    run = json.loads(path.read_text())
    run["samples"][0]["after"] = "x" * 400  # a word without an end
    path.write_text(json.dumps(run))
    write_report(folder)
    (folder / "look.html").write_text(LOOK.format(url="report.html", width=width))
    dom = browse(f"file://{folder}/look.html", "--allow-file-access-from-files", "--dump-dom", folder=folder)
    assert f"<title>w{width} s6</title>" in dom  # the loss's three, learning rate, gradient norm, tokens/s


class Links(HTMLParser):
    """What a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {name}={value}" for name, value in attributes if name in ("src", "href", "srcset")]
        self.found += [tag] if tag in ("script", "link", "iframe", "object", "embed", "form") else []


def test_the_page_fetches_nothing_and_runs_nothing(folder):
    html = write_report(folder).read_text()
    links = Links()
    links.feed(html)
    assert links.found == []
    assert "url(" not in html and "@import" not in html and "http" not in html
    assert len(html) < 200_000


def test_what_a_model_says_is_text_and_not_html(folder):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    html = page(folder, samples=[{"asked": evil, "wanted": evil, "before": evil, "after": evil + " & more"}])
    assert "<script" not in html and "<img" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4


def test_a_run_on_a_gpu_shows_planned_and_measured_memory(folder):
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    gib = 1 << 30
    html = page(folder, metrics=metrics | {"allocated_bytes": 18 * gib, "predicted_bytes": 20 * gib})
    assert "18.00 GiB planned 20.00 GiB (-10.0 %)" in words(html)


def test_what_went_wrong_on_the_way_is_said(folder):
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "skipped": "its numbers were not finite"}\n')
    html = page(folder, metrics=metrics | {"step_downs": ["step 4: each micro-batch in 2 parts"]})
    assert "Out of memory in step 4: each micro-batch in 2 parts. No step was lost." in words(html)
    assert "1 step was skipped" in words(html)


def test_a_run_without_held_out_rows_and_samples_has_a_page(folder):
    (folder / "metrics.jsonl").write_text("")
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    html = page(folder, samples=[], metrics=metrics | {"eval_loss": None, "eval_loss_before": None})
    assert "nothing was held out" in html and "Answers to held-out prompts" not in html and "<svg" not in html


def test_an_evaluation_is_part_of_the_page(folder):
    sample = {"asked": "A?", "wanted": "B.", "before": "C.", "after": "D."}
    told = {"source": "rows.jsonl", "trained_tokens": 1234, "samples": [sample]}
    told |= {"base": {"loss": 2.0, "perplexity": 7.389}, "adapter": {"loss": 1.0, "perplexity": 2.718}}
    (folder / "eval.json").write_text(json.dumps(told))
    text = words(write_report(folder).read_text())
    assert "base 2.0000 7.39 with the adapter 1.0000 2.72 rows.jsonl, 1,234 trained tokens" in text
    assert "asked A? before C. after D. in the data B." in text


def test_make_report_writes_it_again(folder, capsys):
    (folder / "report.html").unlink()
    assert run_command("report", "tiny", replace(RECIPE, out=str(folder)), []) == 0
    assert capsys.readouterr().out == f"written: {folder / 'report.html'}\n"
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_under_way_can_be_looked_at(folder, capsys, resumed):
    """resumed: run.json tells of its first part."""
    if not resumed:
        (folder / "run.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:50]) + lines[50][:20])  # it is just being written
    recipe = replace(RECIPE, out=str(folder))
    with held_by_another(folder / ".lock", "alone"):
        before = {path.name for path in folder.iterdir()}
        assert run_command("report", "tiny", recipe, []) == 0
        assert {path.name for path in folder.iterdir()} == before | {"report.html"}
    said = capsys.readouterr().out
    assert said == f"the run is under way: the page shows it as far as it is\nwritten: {folder / 'report.html'}\n"
    text = words((folder / "report.html").read_text())
    last = json.loads(lines[49])["step"]
    assert f"Run “run”, under way: step {last}" in text and f"{last} optimizer steps" in text
    assert "Norm of the gradient" in text and "Answers" not in text


def test_a_run_that_was_killed_can_be_looked_at(folder, capsys):
    (folder / "run.json").unlink()
    assert run_command("report", "tiny", replace(RECIPE, out=str(folder)), []) == 0
    text = words((folder / "report.html").read_text())
    assert "not ended: step 194" in text and "no process goes on with it; ARGS=--resume does" in text
    assert re.search(r"held-out loss 5\.5\d\d → 0\.0\d\d", text)


def test_a_run_before_its_first_step_is_one_line(folder, capsys):
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 5.5}\n')
    with held_by_another(folder / ".lock", "alone"):
        assert run_command("report", "tiny", replace(RECIPE, out=str(folder)), []) == 2
    assert "has nothing to show: the run there has taken no step yet" in capsys.readouterr().err


def test_a_page_that_was_half_written_stops_no_run(folder):
    (folder / "report.html.123.writing").write_text("<html>")
    assert prepare_run_folder(str(folder), "resume") == folder
    assert not (folder / "report.html.123.writing").exists()


def test_a_folder_without_a_run_is_one_line(folder, tmp_path, capsys):
    assert run_command("report", "tiny", replace(RECIPE, out=str(tmp_path / "nothing")), []) == 2
    assert "has nothing to show: there is no run there, or it took no step" in capsys.readouterr().err
    for text, message in (("{", "is damaged"), ("[]", "holds no object"), ('{"metrics": {}}', "of another version")):
        (folder / "run.json").write_text(text)
        with pytest.raises(UserError, match=message):
            write_report(folder)
