"""A domain as an ordinary checkpoint of the base's architecture, which any engine loads.

The checkpoint is written beside its place, loaded again by ``AutoModelForCausalLM`` and compared
with the pathway on random tokens; only then it is put there.
"""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from hf_sparse_pathways.discovery.profiles import Profile
from hf_sparse_pathways.errors import PathwaysError, option
from hf_sparse_pathways.files import as_json, write_atomically
from hf_sparse_pathways.modeling.baking import Form, bake, check_bias, without_bias
from hf_sparse_pathways.modeling.causal_lm import SparsePathwaysForCausalLM
from hf_sparse_pathways.modeling.model import SparsePathwaysModel
from hf_sparse_pathways.modeling.reselection import reselect
from hf_sparse_pathways.modeling.tokenizing import load_tokenizer
from hf_sparse_pathways.outputs import check_output, written_whole
from hf_sparse_pathways.pathways.pathway import Pathways
from hf_sparse_pathways.share.card import CARD_NAME
from hf_sparse_pathways.share.hub import Push
from hf_sparse_pathways.share.plain_card import Facts, find_license, render_plain_card
from hf_sparse_pathways.share.pushing import push_checkpoint
from hf_sparse_pathways.share.verification import check_checkpoint, describe_change

EXPORT_NAME = "export.json"
"""What an exported folder says of itself, and is known by."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was exported.

    Attributes:
        folder: Where the checkpoint is.
        facts: What its card says.
        address: Of the commit, or of the pull request, if it was pushed.
    """

    folder: Path
    facts: Facts
    address: str | None = None


def export(  # noqa: PLR0913
    model: Any,
    domain: str,
    output: str | PathLike[str],
    *,
    tokenizer: Any = None,
    profile: Profile | None = None,
    multiple_of: int = 1,
    bias: str = "keep",
    license: str | None = None,
    overwrite: bool = False,
    repo_id: str | None = None,
    **push: Any,
) -> Export:
    """Write one domain's pathway as a plain checkpoint, whole or not at all.

    Every FFN block has one width: that of the widest block, with zeros in the others; or, with a
    profile, neurons are selected anew, equally many in every block. Compensation is part of the
    weights. The model is left as it was.

    Args:
        model: A model with pathways, or the folder or Hub id of one.
        domain: Which of its domains.
        output: The folder to write.
        tokenizer: Written beside the weights; by default the folder's, or the base's.
        profile: Of the dense model, with that domain, to select from.
        multiple_of: Widths are rounded up to multiples of this.
        bias: ``"keep"``, or ``"drop"`` to leave out a pathway's bias, for which not every
            architecture has a place; what that changes is measured.
        license: Of the weights, for the card; by default what the folder's own card says.
        overwrite: Whether an earlier export may be replaced.
        repo_id: A Hub repository to push it to as well.
        push: As in ``Push``.

    Raises:
        UnknownNameError: There is no such domain.
        UnsupportedModelError: The architecture has no form for it; the message says why.
        PathwaysError: The output may not be written, or blocks would not be narrower.
        MismatchError: What was written does not compute the pathway; nothing is left of it.
        HubError: The Hub refuses; the folder stays.
    """
    output = Path(output)
    check_bias(bias)
    check_output(output, overwrite, EXPORT_NAME)
    pushed = Push(**push)
    if isinstance(model, (str, PathLike)):
        license = license or find_license(Path(model))
        tokenizer = tokenizer or load_tokenizer(model)
        model = SparsePathwaysForCausalLM.from_pretrained(model, dtype="auto")
    sparse = _chosen(model, domain, profile, multiple_of)
    bare = without_bias(sparse.pathways) if bias == "drop" else sparse.pathways
    wanted = sparse if bare is sparse.pathways else _with(sparse, bare)
    plain, form = bake(wanted, domain, multiple_of=multiple_of)
    with written_whole(output) as folder:
        plain.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        facts = Facts(
            pathways=wanted.pathways,
            domain=domain,
            architecture=type(plain).__name__,
            fields=_changed_fields(sparse, form),
            parameters=(sparse.num_parameters(), plain.num_parameters()),
            padded=_padded(wanted.pathways, domain, form),
            dtype=str(plain.dtype).removeprefix("torch."),
            error=check_checkpoint(folder, wanted, domain),
            dropped=None if wanted is sparse else describe_change(sparse, wanted, domain),
            license=license,
        )
        write_atomically(folder / EXPORT_NAME, as_json(facts.to_dict()))
        write_atomically(folder / CARD_NAME, render_plain_card(facts, repo_id).encode())
    address = None if repo_id is None else push_checkpoint(output, repo_id, pushed)
    return Export(folder=output, facts=facts, address=address)


def _chosen(model: Any, domain: str, profile: Profile | None, multiple_of: int) -> Any:
    """Return a model with the pathway that is exported: the one there is, or one selected anew.

    Raises:
        PathwaysError: It has no pathways, or no multiple was given.
        UnknownNameError: There is no such domain.
    """
    if not isinstance(model, SparsePathwaysModel):
        raise PathwaysError(
            f"export takes a model with pathways, and {type(model).__name__} has none. Give it a "
            "model of SparsePathwaysForCausalLM, or the folder that `sparse-pathways build` wrote."
        )
    if type(multiple_of) is not int or multiple_of < 1:
        raise PathwaysError(
            f"{option('multiple_of')} has to be a whole number of at least 1, got {multiple_of!r}."
        )
    if profile is None:
        return _with(model, model.pathways.subset([domain]))
    return _with(model, reselect(model, domain, profile, multiple_of=multiple_of))


def _with(model: Any, pathways: Pathways) -> Any:
    """Return a model with other pathways that shares the weights and computes the reference."""
    dense = model.to_dense()
    # Wherever the model was loaded from, its weights are those of the base.
    dense.config._name_or_path = pathways.base.name
    dense.config._commit_hash = pathways.base.revision
    return SparsePathwaysForCausalLM.from_dense(dense, pathways, executor="masked").eval()


def _changed_fields(model: Any, form: Form) -> dict[str, tuple[Any, Any]]:
    """Return field -> value in the base, and in what is exported."""
    base = model.config.get_text_config(decoder=True)
    return {field: (getattr(base, field), value) for field, value in form.fields.items()}


def _padded(pathways: Pathways, domain: str, form: Form) -> int:
    """Return how many neurons fill blocks up to their width."""
    return sum(form.widths.values()) - sum(block.kept for block in pathways[domain].blocks)
