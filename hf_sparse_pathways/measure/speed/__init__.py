"""Wall clock: executors beside dense, alternately in one process."""
