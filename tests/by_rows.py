"""Batches whose rows have domains of their own, beside a plain model of each."""

import torch

from tests.modeling.test_generate import FORMS, _generate


def assert_rows_with_padding(model, references, rows, ids, form):
    """Rows of several domains, one of them padded, are generated as by each domain's reference.

    Args:
        model: With the domains.
        references: Domain -> a plain model that computes it.
        rows: The rows' domains.
        ids: Their prompts.
        form: A name in ``FORMS``.
    """
    ids, mask = ids.clone(), torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    found = _generate(model, ids, attention_mask=mask, domain=rows, **FORMS[form])
    for row, name in enumerate(rows):
        expected = _generate(references[name], ids, attention_mask=mask, **FORMS[form])
        assert torch.equal(found[row], expected[row])
