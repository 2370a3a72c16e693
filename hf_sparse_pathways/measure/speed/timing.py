"""Arms timed in turn, and how much of it fits a budget.

Each round calls every arm once, so that a machine's slow and fast spells fall on all of them;
ratios are taken within a round. Which arm comes first rotates, and the first round is discarded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tqdm.auto import tqdm

from hf_sparse_pathways.errors import PathwaysError, named
from hf_sparse_pathways.measure.speed import clock

LEAST_ROUNDS = 3
MOST_ROUNDS = 25
WANTED_ROUNDS = 9
"""For which the tokens per call are chosen: a median of more short rounds is the steadier one."""

LEAST_TOKENS = 8
"""New tokens per call: fewer would time the first steps only."""

MOST_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class TimingSettings:
    """How long to measure.

    Attributes:
        budget: Seconds for all of it. What has to be timed is timed, even if it takes longer: at
            least 3 rounds of every workload.
        rounds: Timed rounds per workload; None for as many as the budget allows, 3 to 25.
        new_tokens: Tokens that a call of ``generate`` makes; None for as many as the budget
            allows, 8 to 64.

    Raises:
        PathwaysError: One is out of range.
    """

    budget: float = 240.0
    rounds: int | None = None
    new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.budget < float("inf"):
            raise PathwaysError(
                f"{named('budget', self.budget)} does not fit: give seconds, 0 for the least."
            )
        if self.rounds is not None and self.rounds < 1:
            raise PathwaysError(f"{named('rounds', self.rounds)} does not fit: at least 1.")
        if self.new_tokens is not None and self.new_tokens < 2:
            raise PathwaysError(
                f"{named('new_tokens', self.new_tokens)} does not fit: at least 2, since a step "
                "is timed from token to token."
            )

    def fit_rounds(self, seconds: float, share: float) -> int:
        """Return how many rounds of some seconds, and the discarded one, fit into a share."""
        if self.rounds is not None:
            return self.rounds
        return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(share / max(seconds, 1e-9)) - 1))

    def fit_tokens(self, seconds: float, share: float) -> int:
        """Return how many new tokens per call let the wanted rounds fit into a share.

        Args:
            seconds: Of a round whose calls make ``LEAST_TOKENS`` each.
            share: Seconds.
        """
        if self.new_tokens is not None:
            return self.new_tokens
        rounds = (WANTED_ROUNDS if self.rounds is None else self.rounds) + 1
        fitting = LEAST_TOKENS * share / max(seconds * rounds, 1e-9)
        return max(LEAST_TOKENS, min(MOST_TOKENS, int(fitting)))


def alternate(
    runs: Mapping[str, Callable[[], float]], rounds: int | Callable[[float], int], label: str
) -> dict[str, tuple[float, ...]]:
    """Call every arm once per round, after a round that is discarded.

    Args:
        runs: Arm -> a call that measures it and returns the figure.
        rounds: Rounds that count, or a function from the seconds that the discarded one took.
        label: Of the progress bar.

    Returns:
        Arm -> one figure per round.
    """
    started = clock.now()
    for run in runs.values():
        run()
    count = rounds(clock.now() - started) if callable(rounds) else rounds
    names = list(runs)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for index in tqdm(range(1, count + 1), desc=label, unit="round", disable=None, leave=False):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            figures[name].append(runs[name]())
    return {name: tuple(values) for name, values in figures.items()}
