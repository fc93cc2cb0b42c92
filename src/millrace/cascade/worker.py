"""One rank of the trainer, started by `millrace run` as `python -m millrace.cascade.worker RUN_DIR [LAST_STAGE]`."""

from __future__ import annotations

import errno
import gc
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from millrace.cascade.engines import start_fleet
from millrace.cascade.gates import has_gate
from millrace.cascade.history import read_history
from millrace.cascade.judges import start_judges
from millrace.cascade.ledger import Ledger
from millrace.config.loading import load_recipe, written
from millrace.config.schema import Recipe
from millrace.errors import MillraceError

FINISHED, FAILED, GATED, STOPPED = 0, 1, 3, 130
EXIT_CODES = {"finished": FINISHED, "paused": FINISHED, "gated": GATED, "stopped": STOPPED}


def main(run_dir: Path, until: str | None = None) -> int:
    recipe, is_main = load_recipe(run_dir / "recipe.yaml"), os.environ.get("RANK", "0") == "0"
    if is_main and (found := Ledger(run_dir).recover()):
        sys.stderr.write(f"{found}\n")
    if is_finished(recipe, run_dir):
        if is_main:
            sys.stdout.write(f"{recipe.name} is finished, see {run_dir}/report.html; another run_dir starts afresh\n")
        return FINISHED
    try:
        return _run(recipe, run_dir, until)
    except MillraceError as error:
        sys.stderr.write(f"{error}\n")
        return FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.stderr.write(
            f"no room left to write {error.filename or run_dir}: make room and run the same command again\n"
        )
        return FAILED
    except KeyboardInterrupt:  # before the run takes signals as requests: nothing is done yet that could be saved
        return STOPPED


def _run(recipe: Recipe, run_dir: Path, until: str | None) -> int:
    with ExitStack() as services:
        # Engines take longest to come up, and starting them needs no torch: they do while this rank is still importing.
        fleet = start_fleet(recipe, run_dir)
        if fleet is not None:
            services.callback(fleet.close)
        judges = start_judges(recipe, run_dir)
        services.callback(judges.close)
        gc.disable()  # nothing of what is imported is garbage; to look for it takes a tenth of a rank's start
        from millrace.cascade.runner import run

        gc.freeze()
        services.callback(gc.unfreeze)  # nanobind calls what is frozen at the end of the process leaked
        gc.enable()
        return EXIT_CODES[run(recipe, run_dir, fleet, judges, until=until)]


def is_finished(recipe: Recipe, run_dir: Path) -> bool:
    """Whether nothing is left to do: all stages are through and judged by the gates they have, and what they end in is
    there."""
    ledger, names = Ledger(run_dir), [stage.name for stage in recipe.stages]
    verdicts = read_history(ledger.events(), names).gates
    judged = all(
        verdicts[stage.name]["gate"] == written(stage.gate) if stage.name in verdicts else not has_gate(stage)
        for stage in recipe.stages
    )
    exported = not recipe.export or (run_dir / "export").exists()
    return exported and judged and ledger.is_finished(names)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:3]))
