"""Whether a run can report to a tracker, asked before anything is loaded."""

import importlib.util
import subprocess
import sys

from common.recipe import ReportTo, UserError, require

# wandb knows where its credentials may lie: the environment, .netrc, settings. No terminal: it cannot ask for a key.
LOGIN = "import wandb; wandb.login(verify=False)"
LOGIN_TIMEOUT_SECONDS = 60


def refuse_unready_tracker(tracker: ReportTo) -> None:
    """Raises UserError when the tracker is not installed, and when wandb has no key and is not told to stay offline."""
    if tracker == "none":
        return
    found = importlib.util.find_spec(tracker)
    require(
        found is not None and found.origin is not None,  # a folder of that name, such as wandb's own files, has none
        f"TrainSpec.report_to is {tracker!r}, which is not installed: .venv/bin/pip install {tracker}",
    )
    if tracker != "wandb":
        return
    try:
        login = subprocess.run(
            [sys.executable, "-c", LOGIN],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LOGIN_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:  # it may work later; if not, the run says so and goes on
        return
    if login.returncode:
        reason = login.stderr.strip().splitlines()[-1] if login.stderr.strip() else f"status {login.returncode}"
        raise UserError(
            f"TrainSpec.report_to is 'wandb', and wandb says: {reason.rpartition('Error: ')[2]} Log in: "
            ".venv/bin/wandb login; or keep the metrics here: WANDB_MODE=offline make finetune ..."
        )
