"""What every process of a launch runs: checks in the same order, and what came of each is written.

Usage: a launcher's ``-m tests.launched.job FOLDER``.
"""

import json
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState

from tests.launched import data_parallel, layers, tensor_parallel

CHECKS = {
    f"{module.__name__}.{name}": check
    for module in (data_parallel, layers, tensor_parallel)
    for name, check in vars(module).items()
    if name.startswith("check_")
}


def run(folder):
    state = PartialState(cpu=True, timeout=timedelta(minutes=5))
    results = {}
    for name, check in CHECKS.items():
        state.wait_for_everyone()
        try:
            check(state, folder / name)
            results[name] = "ok"
        except Exception:  # noqa: BLE001
            results[name] = traceback.format_exc()
    (folder / f"{state.process_index}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # tp_plan= has another name by now
    run(Path(sys.argv[1]))
