"""What a study found, as people read it: lines of the table, curves and dots of the figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from foster_lib.study_tables import COSTS, STALE, readable_table, study_figure


def test_a_line_goes_on_beyond_what_was_not_measured():
    """All values stay on the axis, and the points that there are are joined."""
    names = {"dataset": "toy", "sweep": "N", "method": "foster", "metric": "ndcg@10", "as_profile": False}
    table = pd.DataFrame([{**names, "value": v, "mean": mean, "std": 0.0} for v, mean in zip("abc", (1, np.nan, 3))])
    figure = study_figure({"panels": ["ndcg@10"], "labels": {"ndcg@10": "NDCG@10"}}, table)
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "b", "c"]
    assert axis.lines[0].get_xydata().tolist() == [[0, 1], [2, 3]]
    plt.close(figure)


def test_a_part_begins_with_its_heading():
    """In the table a line of its own, in the figure a bold label without a dot; stale rows keep their part."""
    spec = {"panels": ["ndcg@10"], "columns": [], "labels": {"ndcg@10": "NDCG@10", "recall@10": "Recall@10"}}
    spec["variants"] = [{"name": "b", "part": "second"}, {"name": "c"}, {"name": "d", "part": "third"}]
    rows = [
        {"variant": name, "metric": metric, "mean": value, "std": 0.01, "as_profile": name == "a"}
        for value, name in enumerate(("a", "b" + STALE, "c", "d"))
        for metric in ("ndcg@10", "recall@10")
    ]
    table = pd.DataFrame(rows).assign(dataset="toy", sweep="", value="", ratio_to_full=1.0, recovered_gain=1.0)
    table[COSTS] = 1.0
    shown = readable_table(spec, table, [])
    assert list(shown["Row"]) == ["a †", "second:", "b (stale)", "c", "third:", "d"]
    assert set(shown.loc[shown["Row"] == "second:"].iloc[0, 1:]) == {""} and "" not in set(shown["NDCG@10"][2:4])
    axis = study_figure(spec, table).axes[0]
    labels = {label.get_text(): label.get_fontweight() for label in axis.get_yticklabels()}
    expected = {"a": 5, "second": 4, "b (stale)": 3, "c": 2, "third": 1, "d": 0}
    assert dict(zip(labels, axis.get_yticks())) == expected
    assert [name for name, weight in labels.items() if weight == "bold"] == ["second", "third"]
    dots = {tuple(point) for line in axis.lines if line.get_marker() in "oD" for point in line.get_xydata()}
    assert dots == {(0, 5), (1, 3), (2, 2), (3, 0)}
    plt.close("all")
    rest = table[table["variant"] != "b" + STALE]  # a part begins with the first of its rows that is there
    assert list(readable_table(spec, rest, [])["Row"]) == ["a †", "second:", "c", "third:", "d"]
