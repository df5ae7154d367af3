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
    "Linear model (EASE) + text similarity, closed form": "linear-text",
    "Random": "random",
    "K-Center": "k-center",
    "KD (k-means, the teachers' labels)": "kd",
    "KD, as FOSTER starts": "kd-start",
    "FOSTER without a teacher": "foster-free",
    "**FOSTER**": "foster",
}


TABLE2 = pd.read_csv(ROOT / "results" / "table2" / "table2.csv")
DATASETS = {"MovieLens-100K": "ml-100k", "Foods": "foods", "Games": "games", "Yelp": "yelp"}


def readme_columns() -> dict[str, dict[str, str]]:
    """The cells of the results' table by data set and title of the row."""
    text = re.search(r"<!-- table2 -->\n(.*?)\n\n", README, re.DOTALL)[1]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {DATASETS[name]: {row[0]: row[place] for row in rows} for place, name in enumerate(head[1:], start=1)}


@pytest.mark.parametrize("dataset", TABLE2["dataset"].unique())
def test_the_readmes_table_is_the_committed_one(dataset):
    table = TABLE2[TABLE2["dataset"] == dataset].set_index(["method", "metric"])
    expected = dict.fromkeys(ROWS, "–")
    for title, method in ROWS.items():
        if (method, "ndcg@10") in table.index:
            own = table.loc[(method, "ndcg@10")]
            spread = f" ± {own['std']:.4f}" if own["runs"] > 1 else ""
            expected[title] = f"{own['mean']:.4f}{spread} ({own['ratio_to_full']:.3f})"
    foster = table.loc["foster"]
    expected["FOSTER, Recall@10 ratio"] = f"{foster.loc['recall@10', 'ratio_to_full']:.3f}"
    expected["FOSTER, recovered gain"] = f"{foster.loc['ndcg@10', 'recovered_gain']:.2f}"
    assert readme_columns()[dataset] == expected


def test_links_of_the_documentation_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
