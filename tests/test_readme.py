"""The figures in README.md are those of results/table2, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = {
    "Full data": "full",
    "Mean of three full-data models": "teachers",
    "Untrained (text similarity)": "untrained",
    "Popularity": "popularity",
    "Item-kNN": "item-knn",
    "Random": "random",
    "K-Center": "k-center",
    "KD (k-means, the teachers' labels)": "kd",
    "KD, as FOSTER starts": "kd-start",
    "**FOSTER**": "foster",
}


def readme_tables() -> dict[str, dict[str, list[str]]]:
    """Rows of the results tables by data set, each a list of cells."""
    found: dict[str, dict[str, list[str]]] = {}
    part = README[README.index("## Results") : README.index("## Claims")]
    for dataset, text in re.findall(r"<!-- table2: (\S+) -->\n(.*?)\n\n", part, re.DOTALL):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
        found[dataset] = {cells[0]: cells[1:] for cells in lines}
    return found


TABLE2 = pd.read_csv(ROOT / "results" / "table2" / "table2.csv")


@pytest.mark.parametrize("dataset", TABLE2["dataset"].unique())
def test_the_readmes_table_is_the_committed_one(dataset):
    table = TABLE2[TABLE2["dataset"] == dataset].set_index(["method", "metric"])
    rows = readme_tables()[dataset]
    expected = {title: method for title, method in ROWS.items() if method in table.index.unique("method")}
    assert set(rows) == set(expected)
    for title, method in expected.items():
        ndcg, recall, ratio, gain = rows[title]
        for cell, metric in ((ndcg, "ndcg@10"), (recall, "recall@10")):
            own = table.loc[(method, metric)]
            spread = f" ± {own['std']:.4f}" if own["runs"] > 1 else ""
            assert cell == f"{own['mean']:.4f}{spread}", f"{title}, {metric}"
        own = table.loc[(method, "ndcg@10")]
        assert (ratio, gain) == (f"{own['ratio_to_full']:.3f}", f"{own['recovered_gain']:.2f}"), title


def test_links_of_the_documentation_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
