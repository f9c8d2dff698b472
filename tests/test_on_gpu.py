"""on_gpu.py with a CPU in its GPU's place: one is at hand for a quarter of an hour, and the script
must not be what fails then."""

import json
import math
import os

import pytest

import bench
import on_gpu


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    results = on_gpu.main(["--device", "cpu", "--quick", "--budget", "900", "--out", str(out)])
    # JSON has no nan: what a CPU does not have, such as an MFU, is null there.
    assert json.loads((out / "on_gpu.json").read_text())["steps"].keys() == results["steps"].keys()
    return results["steps"]


def test_every_step_runs_and_agrees(results):
    """A failure means that a step would be lost on the day that a GPU is there, or that its check
    calls equal what is not, or the other way round."""
    errors = {name: step["error"] for name, step in results.items() if "error" in step}
    assert not errors
    checks = {f"{name}, {key}": value for name, step in results.items()
              for key, value in step.items() if isinstance(value, dict) and "bound" in value}
    assert [name for name, value in checks.items() if not value["ok"]] == []
    assert len(checks) == (13 if bench.TRANSFORMERS else 12)
    assert {"spin", "irft", "dpo", "adversarial, reverse_kl"} <= {*results["methods"]["golden"]}


def test_every_rung_trains_the_same_model(results):
    """The losses of all rungs to bfloat16's precision, and those in float32 to rounding: fast is
    nothing else than fast. A step's FLOPs by hand: 6 N + 12 L D T a token."""
    steps = [results[f"step, {rung}"] for rung in bench.RUNGS]
    for step in steps:
        assert step["loss"] == pytest.approx(steps[0]["loss"], rel=0.01)
        assert step["tokens_per_second"] == pytest.approx(2 * 16 / step["seconds"])
        assert 0 < step["min"] <= step["seconds"] <= step["max"] and math.isnan(step["mfu"])
    assert steps[1]["loss"] == steps[0]["loss"] != steps[2]["loss"]


def broken(s):
    raise ValueError("some mistake")


def dies(s):
    os._exit(1)


def works(s):
    return {"value": 1}


def test_a_failing_step_costs_no_other(tmp_path):
    """An exception, and a process that is gone: its step waits until its time is up. What would
    not fit the budget is left out. A failure means that one mistake ends the quarter of an hour."""
    s = on_gpu.Settings(str(tmp_path), "cpu", budget=900.0)
    plan = [("first", 300, works), ("dies", 1, dies), ("broken", 300, broken), ("next", 300, works),
            ("long", 901, works)]
    steps = on_gpu.perform(plan, s)["steps"]
    assert steps["first"]["value"] == steps["next"]["value"] == 1
    assert "TimeoutError" in steps["dies"]["error"] and steps["dies"]["took"] < 60
    assert "ValueError: some mistake" in steps["broken"]["error"]
    assert "left out" in steps["long"]["error"] and steps["long"]["took"] < 1
