"""A recipe's story, its main, as a run: a command calls it, or Python code and notebooks do.

Standard library only at import, as recipes.
"""

import contextlib
import inspect
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import ParamSpec

from common.machine.paths import output_path
from common.machine.processes import is_main_process
from common.process_state import quiet_libraries
from common.recipe import Recipe, Stopped, UserError, require
from common.run.folder import ADAPTER_WEIGHTS, HoldsRun, hold_run_folder, put_old_run_back
from common.run.tracker_check import refuse_unready_tracker

Parameters = ParamSpec("Parameters")
TYPED_IN_A_CELL = "notebook"  # the name of a recipe whose main is in no file


def story(main: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Makes the call of a recipe's main a run, as `make finetune` does: main(RECIPE), or main(replace(RECIPE, ...)).

    Its folder is the recipe's `out`, else the default one. A folder that holds a run is refused at once, as
    Recipe.existing_run says. Errors that a user can mend are UserError, Ctrl-C is Stopped, with what goes on; with
    either, and at the end, the memory of the GPU is given back.
    """

    @wraps(main)
    def call(*given: Parameters.args, **named: Parameters.kwargs) -> None:
        bound = inspect.signature(main).bind(*given, **named)
        bound.apply_defaults()
        (recipe,) = bound.arguments.values()
        _call_from_python(main, with_output_folder(recipe, recipe_name(main)))

    return call


def recipe_name(main: Callable[..., object]) -> str:
    """The recipe's name, as at make: that of the file its main is in."""
    file = Path(inspect.unwrap(main).__code__.co_filename)
    is_cell = not file.is_file() or file.parent.name.startswith("ipykernel")  # Jupyter writes a cell there to debug it
    return TYPED_IN_A_CELL if is_cell else file.stem.replace("_", "-")


def with_output_folder(recipe: Recipe, name: str, typed: str | None = None) -> Recipe:
    """The recipe with the folder of its run: the one that was typed, its own, or the default one for its name."""
    return replace(recipe, out=str(output_path(typed or recipe.out or f"outputs/{name}")))


def run_story(main: Callable[..., object], recipe: Recipe) -> None:
    """Calls a recipe's main in the folder of its run, which nobody else may write into meanwhile.

    main: decorated or not. Raises UserError as hold_run_folder, and where main leaves no adapter.
    """
    from common.machine.collectives import all_gather, init_distributed, run_on_main
    from common.machine.device import require_gpu_per_process
    from common.run.general_texts import refuse_missing_texts
    from common.run.run_date import with_run_date

    if is_main_process():
        refuse_unready_tracker(recipe.train.report_to)
        refuse_missing_texts(recipe.data.drift_source)
    require_gpu_per_process()
    init_distributed()
    with contextlib.ExitStack() as stack:
        run_on_main(lambda: stack.enter_context(hold_run_folder(recipe.out, recipe.existing_run)))
        # All look before any goes on: a run that fails removes the folder that it has left empty.
        require(
            all(all_gather(Path(recipe.out).is_dir())),
            f"{recipe.out} is not on every machine: several machines need a disk that they share, for the checkpoints",
        )
        inspect.unwrap(main)(with_run_date(recipe))
        run_on_main(lambda: _require_adapter(recipe))


def _require_adapter(recipe: Recipe) -> None:
    """Raises UserError when a run that has ended well has left no adapter."""
    places = [Path(place) for place in (recipe.out, recipe.fallback_out) if place]
    require(
        any((place / ADAPTER_WEIGHTS).exists() for place in places),
        f"the recipe's main has ended and left no adapter in {recipe.out}: it calls train(...), which trains and saves",
    )


def _call_from_python(main: Callable[..., object], recipe: Recipe) -> None:
    from common.machine.collectives import shut_down_distributed
    from common.machine.device import this_machine
    from common.machine.failures import failure_in_words

    quiet_libraries()
    if is_main_process():
        put_old_run_back(recipe.out)
    try:
        run_story(main, recipe)
        shut_down_distributed()
    except HoldsRun as error:
        raise UserError(
            f'{recipe.out} already holds a run. From Python: main(replace(RECIPE, existing_run="overwrite")) replaces '
            'it, existing_run="resume" goes on with it, and out="outputs/mine" is another folder'
        ) from error
    except Stopped as stop:
        _let_go(stop)
        hint = '. Go on with: main(replace(RECIPE, existing_run="resume"))' if stop.can_go_on else ""
        raise Stopped(f"{stop}{hint}", stop.signal_number, can_go_on=stop.can_go_on) from stop
    except (UserError, KeyboardInterrupt) as error:
        _let_go(error)
        raise
    except Exception as error:
        if (message := failure_in_words(error, recipe.out)) is None:
            raise  # a fault of the code: a debugger wants its frames
        _let_go(error)
        raise UserError(message) from error
    finally:
        this_machine().reset_peak()


def _let_go(error: BaseException | None) -> None:
    """Frees what the frames of the error hold: a notebook keeps its last error, and with it a model on the GPU."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
