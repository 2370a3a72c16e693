"""Two processes on gloo, as accelerate and torchrun start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _launch(launcher, *arguments):
    """Run a launcher of two processes, each with one thread; return its status and errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", *launcher, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        try:
            _, errors = process.communicate(timeout=900)
        except BaseException:
            process.terminate()  # it ends its processes then, which a killed one would leave behind
            raise
    return process.returncode, errors


def test_two_processes_get_what_one_gets(tmp_path):
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    status, errors = _launch(launcher, "-m", "tests.launched.job", tmp_path)
    assert status == 0, errors
    for process in range(2):
        results = json.loads((tmp_path / f"{process}.json").read_text())
        failed = [result for result in results.values() if result != "ok"]
        assert not failed, "\n".join(failed)
        assert len(results) >= 13


def test_a_process_that_fails_ends_the_launch():
    launcher = ("torch.distributed.run", "--nproc-per-node", "2")
    status, errors = _launch(launcher, "-m", "tests.launched.leaving")
    assert status != 0
    assert "exitcode  : 3" in errors
