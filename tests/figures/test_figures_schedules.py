"""The figure of layer schedules: its marks are the rows of the frame."""

from __future__ import annotations

import pandas as pd
import pytest

import resnet_paths as rp
from resnet_paths.figures import paper_style, plot_layer_schedules


def study(network, *rates):
    names = ["skip", "reverse", "parallel"]
    frame = pd.DataFrame({"network": network, "lesion": names, "error_rate": rates, "intact_error_rate": 0.1})
    return frame.assign(error_rate_low=frame.error_rate - 0.02, error_rate_high=frame.error_rate + 0.03)


BOTH = pd.concat([study("ViT", 0.9, 0.5, 0.2), study("LM", 0.6, 0.7, 0.3)])


@pytest.fixture(autouse=True)
def _style():
    with paper_style("single", aspect=0.8):
        yield


def test_marks_are_the_rows_and_networks_stand_side_by_side():
    ax = plot_layer_schedules(BOTH)
    marks = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert marks["ViT"].get_xdata().tolist() == pytest.approx([90, 50, 20])
    assert marks["ViT"].get_ydata().tolist() == pytest.approx([-0.09, 0.91, 1.91])
    assert marks["LM"].get_ydata().tolist() == pytest.approx([0.09, 1.09, 2.09])
    assert marks["ViT"].get_marker() != marks["LM"].get_marker()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["skip", "reverse", "parallel"]
    assert ax.yaxis_inverted()
    assert ax.get_xlabel() == "test error (%)"
    ends = [bar.get_segments()[0][:, 0].tolist() for bar in ax.collections]
    assert ends[0] == pytest.approx([88, 93])


def test_one_network_needs_no_name():
    ax = plot_layer_schedules(study("ViT", 0.9, 0.5, 0.2).drop(columns="network"))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["schedule", "intact"]


def test_unusable_frames_are_refused():
    with pytest.raises(rp.ResnetPathsError, match="repeated rows"):
        plot_layer_schedules(pd.concat([BOTH, BOTH]))
    with pytest.raises(rp.ResnetPathsError, match="Missing: error_rate_low"):
        plot_layer_schedules(BOTH.drop(columns="error_rate_low"))
    with pytest.raises(rp.ResnetPathsError, match="Divide percentages by 100"):
        plot_layer_schedules(BOTH.assign(error_rate=50.0))
