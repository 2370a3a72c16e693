"""Drawing what users have; matplotlib is imported only for that."""

from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_sparse_pathways.errors import PathwaysError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(thing: Any, kind: str | None = None) -> "Figure":
    """Draw a picture of pathways, a profile or a report.

    ======================  ====================================================================
    object                  kinds, the usual one first
    ======================  ====================================================================
    ``Pathways``            ``sparsity`` of every FFN block, ``overlap`` of kept neurons
    ``Profile``             ``specialisation``, ``skippable``, ``overlap`` of skipped neurons,
                            ``entanglement``, ``experts``: tokens of each routed one
    ``sp.evaluate``'s       ``matrix`` of text by pathway, ``ratios`` to dense, ``cosines``
    ``sp.benchmark``'s      ``speed``, beside its ceiling
    ``RoutingReport``       ``confusion`` of where prompts went
    an ``Analysis``         those of a profile, ``preservation``, ``selection``, ``relation`` of
                            entanglement and the error of sparsified rows, ``experts``
    several of them         ``scale``
    ======================  ====================================================================

    Args:
        thing: The object.
        kind: Which picture. By default the usual one; where that compares domains and there is one
            only, the next.

    Returns:
        The figure: a notebook shows it, ``figure.savefig("name.pdf")`` writes it. pyplot is not
        used, so there is nothing to close.

    Raises:
        PathwaysError: matplotlib is missing, the object is none of these, or it lacks what the
            picture shows.
        UnknownNameError: There is no such kind of the object.
    """
    return load_plots().draw(thing, kind)


def load_plots() -> ModuleType:
    """Return the module that draws.

    Raises:
        PathwaysError: matplotlib is not installed.
    """
    try:
        from hf_sparse_pathways.measure import plots
    except ImportError as error:
        raise PathwaysError(
            "Plots need matplotlib. Install it with `pip install hf-sparse-pathways[plots]`. "
            f"({error})"
        ) from error
    return plots
