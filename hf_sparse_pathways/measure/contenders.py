"""What takes part in a comparison: static methods by name, beside peers and prompted ones.

A static method is what ``select`` is given; it makes pathways from a profile. What ``peers`` and
``prompted`` hold chooses while the model runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_sparse_pathways.discovery.recipe import OBS
from hf_sparse_pathways.measure.peers import PEERS
from hf_sparse_pathways.measure.prompted import PROMPTED

PATHWAY = "pathway"
"""The method whose pooled and random partners are measured too."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One static method in a comparison.

    Attributes:
        label: What the table calls it.
        options: What ``select`` is given.
    """

    label: str
    options: Mapping[str, Any]

    @property
    def repaired(self) -> bool:
        """Whether selecting takes long, since the kept neurons are repaired."""
        return self.options["method"] == OBS or "compensation" in self.options


CONTENDERS: Mapping[str, Contender] = {
    contender.label: contender
    for contender in (
        Contender(label=PATHWAY, options={"method": OBS}),
        Contender(label="one-shot", options={"method": OBS, "order": "one-shot"}),
        *(
            Contender(label=f"clusters-{count}", options={"method": OBS, "clusters": count})
            for count in (2, 4, 8, 16, 32)
        ),
        Contender(label="skip-50", options={"method": OBS, "skip": 0.5}),
        Contender(
            label="clusters-16-skip-50", options={"method": OBS, "clusters": 16, "skip": 0.5}
        ),
        Contender(
            label="clusters-16-shared",
            options={"method": OBS, "clusters": 16, "compensation": "shared+bias"},
        ),
        *(
            Contender(label=f"mixture-{count}", options={"method": OBS, "mixture": count})
            for count in (8, 16, 32, 64)
        ),
        Contender(
            label="random+repair",
            options={"method": "random", "compensation": "refit+bias", "order": "sequential"},
        ),
        Contender(label="wanda", options={"method": "wanda"}),
        Contender(label="flap", options={"method": "flap"}),
        Contender(label="mean_abs", options={"method": "mean_abs"}),
        Contender(label="magnitude", options={"method": "magnitude"}),
        Contender(label="taylor", options={"method": "taylor"}),
        Contender(label="lape", options={"method": "lape"}),
    )
}

DEFAULT_METHODS = (PATHWAY, "one-shot", "random+repair", "wanda", "flap", "taylor", *PEERS)

METHODS = (*CONTENDERS, *PEERS, *PROMPTED)
"""Names of everything that can take part."""


def group_methods(methods: Sequence[str]) -> list[list[str]]:
    """Return methods that are measured in the same passes: those that cost little to select."""
    repaired = [[name] for name in methods if name in CONTENDERS and CONTENDERS[name].repaired]
    plain = [name for name in methods if name in CONTENDERS and not CONTENDERS[name].repaired]
    others = [[name for name in methods if name in group] for group in (PEERS, PROMPTED)]
    return [group for group in (*repaired, plain, *others) if group]
