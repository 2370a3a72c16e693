"""Tables that are measured in parts: rows of other machines stay, and the verdict is of all."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CAPTION = "30% of the FFN FLOPs removed: on 10 tokens; dense perplexity: code {}, law 10.2"
HEADER = "| method | FFN FLOPs | code | law | geometric mean |\n|---|---:|---:|---:|---:|"
PATHWAY = "| pathway | 70.0% | 1.1 (1-1.2) | 1.2 (1.1-1.3) | 1.149 |"
POOLED = "| pooled | 70.0% | 1.3 (1.2-1.4) | 1.3 (1.2-1.4) | 1.3 |"
FLAP = "| flap | 70.0% | 1.1 (1-1.2) | 1.3 (1.2-1.4) | 1.196 |"


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quality

    yield quality
    del sys.modules["quality"]


def _table(quality, *rows, perplexity="5.4"):
    return quality.Table(CAPTION.format(perplexity), HEADER, rows)


def test_the_written_tables_are_read_and_written_as_they_are(quality):
    text = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    own = text[text.index(quality.START) + len(quality.START) : text.index(quality.END)].strip()
    assert quality.join(quality.split_models(own), {}) == own
    assert own.count("geometric mean") >= 6


def test_rows_measured_elsewhere_stay_in_their_order(quality):
    joined = _table(quality, FLAP, perplexity="5.5").beside(_table(quality, PATHWAY, POOLED))
    assert joined.rows == (PATHWAY, FLAP, POOLED)
    assert str(joined).endswith("As good as pathway, or better: flap on code.")
    assert "5.5" in joined.caption


def test_a_row_that_was_measured_again_takes_the_old_one_s_place(quality):
    better = PATHWAY.replace("1.1 (", "1.05 (")
    joined = _table(quality, better).beside(_table(quality, PATHWAY, FLAP, POOLED))
    assert joined.rows == (better, FLAP, POOLED)
    assert str(joined).endswith("No other method of the table is as good as pathway on any domain.")


def test_other_text_is_another_table(quality):
    known = _table(quality, PATHWAY, POOLED)
    other = quality.Table(known.caption.replace("10 tokens", "20 tokens"), HEADER, (FLAP,))
    assert other.beside(known) == other
