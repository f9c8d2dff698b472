"""docs/sweeps.py goes on from a run: what it does not vary must be the run's own."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import afd
from reward import RewardModel, score

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("sweeps", ROOT / "docs" / "sweeps.py")
sweeps = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweeps)
GROUP = "good-harmless-h0"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, one_thread):
    """The sweeps of a tiny run of the harmless task."""
    runs = tmp_path_factory.mktemp("runs")
    afd.main(["--task", "harmless", "--n-corpus", "2000", "--n-demos", "200", "--n-samples", "200",
              "--n-prompts", "40", "--n-candidates", "16", "--methods",
              "closed-form log-ratio 0.3", "--seed", "1", "--out", str(runs / f"{GROUP}-s1")])
    patch = pytest.MonkeyPatch()
    patch.setattr(sweeps, "RUNS", runs)
    yield sweeps.Sweep(GROUP, 1)
    patch.undo()


def rows(sweep, group):
    return {row["name"]: row["golden"] for row in sweep.rows if row["group"] == f"{GROUP}-{group}"}


def test_the_runs_own_schedule_gives_the_runs_own_models(sweep):
    """A failure means that the figure's last point is not the method that the tables measure."""
    sweep.quality([(afd.SFT.lr, sweep.s.sft_epochs)])
    sweep.floors()
    policy, _, rewards = sweep.train(afd.SFT.lr, sweep.s.sft_epochs)
    for name, trained in [("sft", policy), *rewards.items()]:
        own = sweep.run.load(name, type(trained)).state_dict()
        assert all(torch.equal(value, own[key]) for key, value in trained.state_dict().items())
    found = rows(sweep, f"sft-{afd.SFT.lr:g}x{sweep.s.sft_epochs:g}")
    assert found["pi_SFT"] == rows(sweep, "floors")["pi_SFT"]
    candidates = sweep.candidates(sweep.sft)
    for name in ("init-sft", "init-demo", "sft-demo"):
        scores = score(sweep.run.load(name, RewardModel), candidates.pairs)
        picks = scores.reshape(candidates.golden.shape).argmax(1)
        assert found[f"best of 16, {name}"] == candidates.golden[np.arange(40), picks].mean()
    assert found["best of 16, floored"] == rows(sweep, "floors")["best of 16, floor 0.1"]
    assert found["best of 16, log-ratio"] == rows(sweep, "floors")["best of 16, floor 0"]


def test_benign_and_harmful_prompts_make_up_the_whole(sweep):
    sweep.add("g", "x", np.arange(40.0))
    whole, benign, harmful = (row["golden"] for row in sweep.rows[-3:])
    share = sweep.harmful.mean()
    assert 0 < share < 1 and whole == pytest.approx(share * harmful + (1 - share) * benign)


def test_theory_names_the_winner_on_exact_densities(sweep, monkeypatch):
    """On the language the exact ratio orders the responses to a prompt as golden does."""
    monkeypatch.setattr(sweeps.Sweep, "PREDICTED", 32)
    sweep.exact()
    found = {row["name"]: row["golden"] for row in sweep.rows if row["group"] ==
             "exact-good-harmless"}
    assert found["best of 16, ratio"] == pytest.approx(found["best of 16, golden"], abs=1e-3)
    assert found["best of 16, golden"] > found["best of 16, likelihood"]


def test_labels_and_epochs_are_varied_from_the_runs_own(sweep, monkeypatch):
    """No noise and one epoch are the run itself; other shares and epochs are not."""
    monkeypatch.setattr(sweeps, "NOISE", (0, 0.4))
    monkeypatch.setattr(sweeps, "REWARD_EPOCHS", (0.5, 1))
    sweep.noise()
    sweep.longer()
    records = json.loads((sweep.run.folder / "results.json").read_text())["best_of_n"]
    golden = {r["reward_model"]: r["golden"] for r in records if r["n"] == 16}
    for own, other, name in (("noise-0", "noise-0.4", "preference"),
                             ("reward-1", "reward-0.5", "init-sft")):
        # The run has 16 candidates too, and they come from the same stream.
        assert rows(sweep, own)[f"best of 16, {name}"] == pytest.approx(golden[name])
        assert rows(sweep, other)[f"best of 16, {name}"] != pytest.approx(golden[name])
