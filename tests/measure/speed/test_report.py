"""Ratios, ceilings and fractions from known figures, and how they are shown."""

import json
from dataclasses import replace

import numpy
import pytest

from hf_sparse_pathways.errors import UnknownNameError
from hf_sparse_pathways.measure import plots
from hf_sparse_pathways.measure.speed.tables import HEADER, headline, sections
from tests.measure.speed.reports import ARMS, COMPACT, DENSE, FAST, REPORT, timing


def test_ratios_are_taken_within_a_round_and_beside_the_partner():
    timed = timing()
    assert timed.ratios("compact, law") == [1.2, 1.25, 1.2]
    assert timed.ratios("packed, law") == [2.5, 1.25, 2.5]
    assert timed.ratios("packed, law", "packed, dense") == [1.25, 1.25, 1.25]


def test_the_ceiling_is_that_of_the_partners_share():
    timed = timing()
    assert timed.ceiling(COMPACT) == pytest.approx(1 / (1 - 0.5 * 0.5))
    assert timed.ceiling(FAST) == pytest.approx(1 / (1 - 0.25 * 0.4))
    assert timing("ffn").ceiling(COMPACT) == pytest.approx(2.0), "all the time is the FFN's"


def test_what_is_reached_is_a_fraction_of_the_ceiling():
    timed = timing()
    assert timed.reached(COMPACT) == pytest.approx(1.2 * 0.75)
    assert timed.reached(FAST) == pytest.approx(1.25 * 0.9)
    assert timed.reached(DENSE) is None
    rates = {**timed.rates, "compact, law": [v / 0.75 for v in timed.rates["dense"]]}
    assert replace(timed, rates=rates).reached(COMPACT) == pytest.approx(1.0)


def test_a_report_is_plain_json_with_every_round():
    values = json.loads(json.dumps(REPORT.to_dict(), allow_nan=False))
    first = values["timings"][0]
    assert first["label"] == "decode, batch 1"
    assert first["rates"]["compact, law"] == [12.0, 25.0, 48.0]
    assert first["shares"]["dense"]["rest"] == 0.125
    summary = first["summary"]["packed, law"]
    quartiles = numpy.quantile([2.5, 1.25, 2.5], [0.25, 0.5, 0.75])
    assert list(summary["ratio_to_dense"].values()) == pytest.approx(list(quartiles))
    assert summary["ratio_to_same_kernel_dense"]["median"] == 1.25
    assert values["auto"]["executor"] == "compact"
    assert values["unavailable"] == REPORT.unavailable


def test_arms_and_workloads_are_found():
    assert REPORT.arm("packed, law") is FAST
    assert REPORT.timing("decode", 4) is REPORT.timings[1]
    assert REPORT.timing("ffn", 128) is REPORT.timings[3]
    with pytest.raises(UnknownNameError, match="compact, law"):
        REPORT.arm("compct, law")
    with pytest.raises(UnknownNameError, match="decode, batch 4"):
        REPORT.timing("decode", 8)


def test_the_first_lines_say_what_ran_and_what_did_not():
    lines = headline(REPORT)
    assert lines[0].startswith("tiny, float32, cpu, 1 thread, 1 kB of weights")
    assert 'executor="auto" is compact: nothing faster is there' in lines
    assert "not timed: sliced: the neurons lie in too many runs" in lines
    assert "a note" in lines
    assert "+0.0% (+0.0% to +12.5%) at batch 1" in lines[-1]
    without = replace(REPORT, timings=REPORT.timings[2:])
    assert not any("added by the plug-in" in line for line in headline(without))


def test_every_workload_has_a_row_per_arm():
    tables = sections(REPORT)
    assert [len(table.rows) for table in tables] == [len(ARMS)] * 4 + [1, 1]
    rows = {row[0]: row[1:] for row in tables[0].rows}
    assert all(len(row) == len(HEADER) - 1 for row in rows.values())
    assert rows["dense"] == ["20 (15-30)", "", "", "", ""]
    assert rows["packed, dense"][1:] == ["2.00 (1.50-2.00)", "", "", ""]
    assert rows["compact, law (-50%)"][1:] == [
        "1.20 (1.20-1.23)",
        "1.20 (1.20-1.23)",
        "1.33",
        "90%",
    ]
    assert rows["packed, law (-50%)"][2:] == ["1.25 (1.25-1.25)", "1.11", "112%"]
    assert "50% FFN, 25% attention, 12% head, 12% rest" in tables[0].note
    assert "8 new tokens after a prompt of 16" in tables[0].note
    assert tables[4].rows == [["compact", "law, dense", "2.00 (1.50-2.50)", "2"]]
    assert tables[5].rows == [["compact", "law", "500 bytes", "50%", "250"]]


def test_markdown_holds_everything():
    text = REPORT.to_markdown(["plot.png"])
    assert text.startswith("# Speed of tiny\n")
    assert "![plot](plot.png)" in text
    assert str(REPORT) == text.replace("![plot](plot.png)\n\n", "")
    for part in (*headline(REPORT), *(section.title for section in sections(REPORT))):
        assert part in text


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_picture_has_a_panel_per_workload_and_one_of_shares(count):
    figure = plots.plot_speed(replace(REPORT, timings=REPORT.timings[:count]))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    labels = [timed.workload.label for timed in REPORT.timings[:count]]
    assert [axes.get_title() for axes in shown] == [*labels, "dense: shares of the time (%)"]
    names = [text.get_text() for text in shown[0].get_yticklabels()]
    assert names == [arm.label for arm in ARMS[1:]]
    ceilings = [line.get_xdata()[0] for line in shown[0].lines if line.get_label() == "ceiling"]
    assert ceilings == pytest.approx([1 / 0.75, 2.0 / 0.9]), "over plain dense"
    assert len(shown[-1].patches) == 4 * min(count, 3), "FFN blocks alone have no shares"


def test_a_picture_without_shares_has_no_empty_panel():
    figure = plots.plot_speed(replace(REPORT, timings=REPORT.timings[3:]))
    assert [axes.get_title() for axes in figure.axes] == ["FFN blocks alone, 128 tokens"]
