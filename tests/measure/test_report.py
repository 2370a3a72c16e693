"""Reports render what they hold, and quantiles are numpy's."""

import json
import random
from dataclasses import replace

import numpy
import pytest

from hf_sparse_pathways.measure.comparison_report import ComparisonReport, ComparisonRow
from hf_sparse_pathways.measure.figures import format_figure, markdown_table, quantile
from hf_sparse_pathways.measure.quality_report import QualityReport, QualityRow
from hf_sparse_pathways.measure.speed.pairs import GenerationSpeed


def _row(**changes):
    given = {
        "domain": "code",
        "role": "dense",
        "pathway": None,
        "perplexity": 10.0,
        "ratio": 1.0,
        "interval": None,
        "bits_per_byte": 0.9,
        "divergence": 0.0,
        "agreement": 1.0,
        "cosine": 1.0,
        "cosine_per_layer": (1.0, 1.0),
        "flops": 1.0,
        "tokens": 100,
        "documents": 3,
        "excluded": 0,
    }
    return QualityRow(**{**given, **changes})


ROWS = (
    _row(),
    _row(role="pathway", pathway="code", perplexity=12.0, ratio=1.2, flops=0.7),
    _row(role="pooled", pathway="pooled"),
    _row(role="random", pathway="random code"),
    _row(role="other", pathway="law"),
    _row(domain="law", excluded=4),
)
REPORT = QualityReport(base="tiny", rows=ROWS)
SPEED = GenerationSpeed(
    domain="code", executor="compact", sparsity=0.3, dense=(1.0, 2.0, 4.0), sparse=(3.0, 1.0, 8.0)
)


def test_a_sparsity_of_almost_one_does_not_read_as_all():
    assert "sparsity 99.9%)" in str(replace(SPEED, sparsity=0.999))
    quality = replace(REPORT.rows[0], flops=0.0002)
    rows = tuple(
        ComparisonRow(method=method, sparsity=0.999, quality=quality) for method in ("dense", "obs")
    )
    compared = ComparisonReport(base="b", rows=rows)
    assert compared.caption(0.999).startswith("99.9% of the FFN FLOPs removed")
    assert compared.table(0.999)[1][0][1] == "0.02%"


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_quantiles_are_those_of_numpy(count, fraction):
    values = [random.Random(count).gauss(0, 10) for _ in range(count)]
    assert quantile(values, fraction) == pytest.approx(numpy.quantile(values, fraction))
    assert quantile(tuple(sorted(values)), fraction) == quantile(values, fraction)


def test_a_quality_report_is_plain_json():
    text = json.dumps(REPORT.to_dict(), allow_nan=False)
    assert json.loads(text)["base"] == "tiny"
    rows = [
        QualityRow(**{**row, "cosine_per_layer": tuple(row["cosine_per_layer"])})
        for row in json.loads(text)["rows"]
    ]
    assert rows == list(ROWS)


def test_rows_are_found_by_domain():
    assert REPORT.domains == ["code", "law"]
    assert REPORT.of("code") == ROWS[:5]
    assert REPORT.of("law") == ROWS[5:]


def test_every_arm_has_its_own_label():
    labels = [row.label for row in REPORT.of("code")]
    assert labels == ["dense", "pathway code", "pooled", "random", "other domain: law"]


def test_markdown_has_one_table_per_domain_and_one_line_per_row():
    text = str(REPORT)
    assert text == REPORT.to_markdown()
    assert sum(line.startswith("|---") for line in text.splitlines()) == 3, "and the matrix"
    for row in ROWS:
        assert f"| {row.label} | {row.flops:.1%} |" in text
    assert "4 calibration documents left out" in REPORT.caption("law")
    assert "left out" not in REPORT.caption("code")


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_markdown_lines_have_as_many_cells_as_the_header(columns):
    header = [f"h{index}" for index in range(columns)]
    lines = markdown_table(header, [header, header]).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {columns + 1}


@pytest.mark.parametrize("value", [0.01234, 1.0, 12.345, 9999.4, 12345.6, 999999.0, 1e6, 1.5e300])
def test_figures_keep_their_value(value):
    shown = format_figure(value)
    assert float(shown) == pytest.approx(value, rel=1e-3)
    if value < 1e6:
        assert "e" not in shown


def test_a_speed_report_is_plain_json_with_ratios_by_round():
    assert SPEED.ratios == [3.0, 0.5, 2.0]
    values = json.loads(json.dumps(SPEED.to_dict(), allow_nan=False))
    assert values["dense"] == [1.0, 2.0, 4.0]
    assert values["dense_median"] == 2.0
    assert values["sparse_median"] == 3.0
    assert values["ratio_median"] == 2.0
    assert values["ratio_quartiles"] == pytest.approx(numpy.quantile(SPEED.ratios, [0.25, 0.75]))
    assert "ratio 2.00" in str(SPEED)
    assert "3 rounds" in str(SPEED)
