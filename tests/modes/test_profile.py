import json

import pytest

from configs import toy2d
from diffusion.modes import profile

PROGRAM = """\
HloModule jit_step

%fused_computation.1 (p: f32[3]) -> f32[3] {
  %p = f32[3]{0} parameter(0)
  ROOT %add.1 = f32[3]{0} add(%p, %p), metadata={op_name="jit(step)/jvp(UNet)/mid_block/add"}
}

ENTRY %main (a: f32[3]) -> f32[3] {
  %a = f32[3]{0} parameter(0)
  %fusion.7 = f32[3]{0} fusion(%a), kind=kLoop, calls=%fused_computation.1
  ROOT %dot.2 = f32[3]{0} dot(%fusion.7, %a), metadata={op_name="jit(step)/conv_in/dot"}
}
"""


def test_origins():
    found = profile.origins(PROGRAM)
    assert found["dot.2"] == "conv_in/dot"
    assert found["fusion.7"] == "jvp(UNet)/mid_block/add"  # has no name of its own
    assert "a" not in found


def test_time_within_a_loop_counts_once():
    events = [("while", 0, 100), ("dot", 10, 30), ("exp", 15, 5), ("dot", 50, 50), ("copy", 100, 7)]
    times = sorted(profile._own_times(events))
    assert times == [("copy", 7), ("dot", 25), ("dot", 50), ("exp", 5), ("while", 20)]


def test_a_profile_of_points(tmp_path, capsys):
    config = toy2d.get_config()
    config.model.mlp.depth, config.model.mlp.width, config.train.batch_size = 1, 16, 32
    config.profile.steps, config.profile.warmup = 2, 1
    profile.run(config, str(tmp_path))
    summary = json.loads((tmp_path / "profile" / "summary.json").read_text())
    assert summary["images_per_second"] == pytest.approx(32 / summary["step_seconds"])
    assert 0 < summary["waiting_for_data"] < 1
    rows = summary["operations"]
    assert 5 < len(rows) <= profile.SHOWN
    assert any("dot_general" in row["origin"] for row in rows)
    times = [row["milliseconds_per_step"] for row in rows]
    assert times == sorted(times, reverse=True) and sum(row["share"] for row in rows) <= 1 + 1e-6
    said = capsys.readouterr().out
    assert "ui.perfetto.dev" in said and rows[0]["name"] in said
    assert [p.name for p in tmp_path.iterdir()] == ["profile"]
