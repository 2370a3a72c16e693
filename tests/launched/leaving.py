"""Of two processes the second fails, while the first waits for what it has to say."""

import sys

from accelerate import PartialState

from hf_sparse_pathways.processes import Processes

if __name__ == "__main__":
    processes = Processes.of(PartialState(cpu=True))
    if not processes.is_first:
        sys.exit(3)
    processes.gather("waiting")
