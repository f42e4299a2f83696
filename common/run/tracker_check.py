"""Whether a run can report to a tracker, asked before anything is loaded."""

import importlib.util
import os
import subprocess
import sys

from common.recipe import ReportTo, UserError, require

# What transformers' callback for a tracker imports, by the package that brings it; where the names differ alone.
MODULES = {
    "azure_ml": {"azureml-core": "azureml.core"},
    "comet_ml": {"comet-ml": "comet_ml"},
    "dagshub": {"dagshub": "dagshub", "mlflow": "mlflow"},
    "flyte": {"flytekit": "flytekit", "flytekitplugins-deck-standard": "flytekitplugins.deck"},
    "kubeflow": {},  # transformers brings it all
}
# Without these variables a callback has nowhere to report to. (comet_ml and neptune also read files of their own.)
VARIABLES = {"dagshub": "MLFLOW_TRACKING_URI", "kubeflow": "KUBEFLOW_TRAINER_SERVER_URL"}
# wandb knows where its credentials may lie: the environment, .netrc, settings. No terminal: it cannot ask for a key.
LOGIN = "; wandb.login(verify=False)"
TIMEOUT_SECONDS = 60


def refuse_unready_tracker(tracker: ReportTo) -> None:
    """Raises UserError when the tracker cannot be imported, and when it has nowhere to report to.

    That is when it needs a variable of the environment that is not set, and when wandb has no key and is not told to
    stay offline.
    """
    if tracker == "none":
        return
    modules = MODULES.get(tracker, {tracker: tracker})
    missing = [package for package, module in modules.items() if not _is_installed(module)]
    require(
        not missing,
        f"TrainSpec.report_to is {tracker!r}, which is not installed: .venv/bin/pip install {' '.join(missing)}",
    )
    variable = VARIABLES.get(tracker)
    require(
        variable is None or bool(os.environ.get(variable)),
        f"TrainSpec.report_to is {tracker!r}, which needs to know its server: {variable}=https://... make finetune ...",
    )
    if not modules:
        return
    try:
        imported = subprocess.run(
            [sys.executable, "-c", f"import {', '.join(modules.values())}" + (LOGIN if tracker == "wandb" else "")],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:  # it may work later; if not, the run says so and goes on
        return
    if not imported.returncode:
        return
    said = imported.stderr.strip().splitlines()
    reason = said[-1].rpartition("Error: ")[2] if said else f"status {imported.returncode}"
    if tracker == "wandb":
        raise UserError(
            f"TrainSpec.report_to is 'wandb', and wandb says: {reason} Log in: .venv/bin/wandb login; or keep the "
            "metrics here: WANDB_MODE=offline make finetune ..."
        )
    raise UserError(
        f"TrainSpec.report_to is {tracker!r}, which is installed and cannot be imported: {reason}. Install it anew: "
        f".venv/bin/pip install --force-reinstall {' '.join(modules)}"
    )


def _is_installed(module: str) -> bool:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that the module is in
        return False
    # a folder of that name, such as wandb's own files, has no file to import
    return found is not None and found.origin is not None
