"""A picture of each domain's neurons for the card, in the domain's own folder of a repository.

It shows that domain alone and does not name it. So whatever changes other domains, or its name,
leaves it true, and who removes the domain removes it: nothing is ever drawn anew, on a machine that
may not be able to. Without matplotlib a domain goes without.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from hf_sparse_pathways.errors import PathwaysError
from hf_sparse_pathways.measure.plotting import load_plots
from hf_sparse_pathways.pathways.pathway import Pathways

logger = logging.getLogger(__name__)

PICTURE_NAME = "sparsity.png"


def draw_pictures(pathways: Pathways, places: Mapping[str, str], root: Path) -> dict[str, str]:
    """Write a picture of each domain into its folder.

    Args:
        pathways: The domains.
        places: Domain -> its folder, below ``root``, which is there.
        root: A copy of the repository, or of the part of it that is going to be pushed.

    Returns:
        Domain -> path of its picture below ``root``; empty without matplotlib.
    """
    if not pathways.base.blocks:  # of which pictures are
        return {}
    try:
        plots = load_plots()
    except PathwaysError as error:
        logger.info("The card has no pictures. %s", error)
        return {}
    for name in pathways.domains:
        strip = plots.plot_strip(pathways.sparsity(name, per_block=True))
        plots.save_figures({Path(PICTURE_NAME).stem: strip}, root / places[name])
    return {name: f"{places[name]}/{PICTURE_NAME}" for name in pathways.domains}
