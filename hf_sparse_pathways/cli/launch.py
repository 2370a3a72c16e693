"""Commands that a launcher of several processes starts: who takes part, who writes and speaks.

``profile``, ``build`` and ``evaluate`` share their passes over text; when these are done, all
processes but the first are. Other commands refuse.
"""

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import typer

from hf_sparse_pathways.errors import PathwaysError

logger = logging.getLogger(__name__)

SHARING = ("profile", "build", "evaluate")

WAIT = timedelta(days=1)
"""For a slower process of a long pass; one that has failed is noticed by the launcher at once."""

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""What accelerate and torchrun set, all of them."""


def count_processes() -> int:
    """Return how many processes the launch has that this one belongs to; 1 without a launcher."""
    values = [os.environ.get(name, "") for name in _VARIABLES]
    return int(values[-1]) if all(value.isdigit() for value in values) else 1


def name_process() -> str:
    """Return which process this is, for messages; nothing if it is the only one."""
    count = count_processes()
    return f" (process {os.environ['RANK']} of {count})" if count > 1 else ""


def check_sharing(arguments: Sequence[str]) -> None:
    """Check that a command line may be run by several processes.

    Raises:
        PathwaysError: It may not, and it is.
    """
    count = count_processes()
    command = next(iter(arguments), "--help")
    if count > 1 and not command.startswith("-") and command not in SHARING:
        raise PathwaysError(
            f"{command} was started in {count} processes, but does not share its work between "
            f"them. Start it without a launcher; {', '.join(SHARING)} can use several."
        )


def join_launch() -> Any:
    """Return accelerate's state of this launch, in which only the first process speaks; or None.

    Commands compute on the CPU, and so the processes talk through gloo.
    """
    if count_processes() == 1:
        if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
            logger.warning(
                "accelerate launch was asked for several processes, but has started one: on the "
                "CPU it needs --multi_gpu (without a GPU) for more, or use torchrun."
            )
        return None
    from accelerate import PartialState
    from transformers.utils import logging as transformers_logging

    state = PartialState(cpu=True, timeout=WAIT)
    if not state.is_main_process:
        logging.getLogger("hf_sparse_pathways").setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    return state


def is_first(launch: Any) -> bool:
    """Whether this process writes and speaks for its launch."""
    return launch is None or bool(launch.is_main_process)


def leave_unless_first(launch: Any) -> None:
    """End all processes of a launch but the first, successfully.

    Raises:
        Exit: This is another one.
    """
    if not is_first(launch):
        raise typer.Exit
