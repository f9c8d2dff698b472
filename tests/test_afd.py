"""The whole line, small: what a run writes, that it repeats, and every bad input it refuses."""

import dataclasses
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import afd
from model import InputError
from reward import CONTROLS, REWARD_MODELS
from utils.checkpoints import load_pretrained
from toy_envs.text_tasks import FLOURISHES, TextTask
from utils.evaluate import held_out_quality
from train import parse_settings

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--n-corpus", "300", "--n-demos", "60", "--n-samples", "60", "--n-prompts", "6",
         "--n-candidates", "4", "--n-embd", "16", "--n-layer", "1", "--n-head", "2",
         "--device", "cpu"]
ROW_KEYS = ["task", "seed", "method", "reward_model", "n", "beta", "gold_mean", "gold_ci95",
            "win_vs_sft", "win_vs_demo", "proxy_mean", "kl_from_sft", "length_mean", "entropy",
            "distinct", "forward_kl", "reverse_kl", "seconds"]
EVERYTHING = ["--heterogeneity", "0.5", "--methods", "all", "--optimise", "all", "--policy-steps",
              "2", "--betas", "1,0.3", "--divergences", "reverse_kl,forward_kl,jensen_shannon"]


def untimed(rows):
    """Rows without the seconds they took: those are the machine's, not the seed's."""
    return [{**row, "seconds": None} for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    return out, afd.main([*SMALL, *EVERYTHING, "--seeds", "2", "--out", str(out)])


def test_a_run_writes_what_it_promises(run):
    out, results = run
    written = json.loads((out / "results.json").read_text())
    assert "NaN" not in (out / "results.json").read_text()
    assert written["rows"] == results["rows"] and list(written["rows"][0]) == ROW_KEYS
    assert written["config"]["heterogeneity"] == 0.5 and "torch" in written["versions"]
    stages = {"pretrain", "sft", "samples", "init-sft", "candidates", "best-of-N", "po floored 1",
              "adversarial reverse_kl", "spin", "irft", "dpo"}
    assert stages <= set(written["seconds"]["0"])
    selectors = {r["reward_model"] for r in written["rows"] if r["method"] == "bon"}
    assert selectors == {*REWARD_MODELS, *CONTROLS}
    assert {(r["seed"], r["n"]) for r in written["rows"] if r["reward_model"] == "init-sft"} == {
        (seed, n) for seed in (0, 1) for n in (1, 2, 4)}
    for name in ("best_of_n.png", "reward_models.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert (out / "report.html").read_text().count("data:image/png;base64,") == 2
    for name in ("init", "sft", "init-sft"):
        load_pretrained(out / "seed1" / name)
    assert not list(out.rglob("*.part"))
    stages = {json.loads(line)["stage"] for line in (out / "metrics.jsonl").open()}
    assert {"pretrain", "sft", "init-demo", "preference", "po init-sft 0.3", "dpo",
            "spin", "irft"} <= stages


def test_kept_samples_are_those_of_the_table(run):
    """Or the report would show other picks than the ones that the table's numbers are of."""
    samples = json.loads((run[0] / "seed0" / "samples.json").read_text())
    task = TextTask("helpful")
    assert len(samples) == 6
    for sample in samples:
        candidates, writers = sample["candidates"], sample["writers"]
        assert set(candidates["scores"]) == {*REWARD_MODELS, *CONTROLS}
        best = int(np.argmax(candidates["scores"]["init-sft"]))
        assert writers["4, init-sft"]["text"] == candidates["text"][best]
        for said, golden in [*zip(candidates["text"], candidates["scores"]["golden"]),
                             *((said["text"], said["golden"]) for said in writers.values())]:
            assert task.golden(sample["prompt"], said) == golden
    picked = np.mean([max(s["candidates"]["scores"]["golden"]) for s in samples])
    row = next(r for r in run[1]["rows"] if (r["seed"], r["reward_model"], r["n"]) == (
        0, "golden", 4))
    assert row["gold_mean"] == pytest.approx(picked)
    marked = " ".join(sample["writers"]["demonstration"]["text"] for sample in samples)
    assert set(marked.split()) & set(FLOURISHES)        # as written, not as the policy reads it


def test_rows_hold_together(run):
    """N = 1 is SFT itself whatever selects; the golden selector is best; its proxy is golden."""
    rows = run[1]["rows"]
    for seed in (0, 1):
        mine = [r for r in rows if r["seed"] == seed]
        assert len({(r["method"], r["reward_model"], r["n"], r["beta"]) for r in mine}) == len(mine)
        sft = next(r for r in mine if r["method"] == "sft")
        assert sft["win_vs_sft"] == pytest.approx(0.5, abs=0.15) and sft["kl_from_sft"] == 0
        for r in mine:
            if r["method"] == "bon" and r["n"] == 1:
                assert r["gold_mean"] == pytest.approx(sft["gold_mean"])
                assert r["kl_from_sft"] == 0
                assert r["entropy"] == pytest.approx(sft["entropy"])
        best = next(r for r in mine if (r["reward_model"], r["n"]) == ("golden", 4))
        assert best["proxy_mean"] == pytest.approx(best["gold_mean"])
        assert all(best["gold_mean"] >= r["gold_mean"] - 1e-9 for r in mine if r["method"] == "bon")


def test_every_method_is_measured(run):
    """One row a method, model and beta; a missing or infinite number means that a method died in
    silence. Here the demonstrations hold marks that no policy can write (log-probability -inf)."""
    for seed in (0, 1):
        rows = [r for r in run[1]["rows"] if r["seed"] == seed and r["method"] in afd.METHODS]
        count = {method: sum(r["method"] == method for r in rows) for method in afd.METHODS}
        assert count == {"po": 7, "closed-form": 4, "adversarial": 3,
                         "adversarial-exact": 3, "spin": 1, "irft": 1, "dpo": 1}
        assert {(r["reward_model"], r["beta"]) for r in rows if r["method"] == "po"} == {
            *((model, 1.0) for model in REWARD_MODELS), ("init-sft", 0.3)}
        for r in rows:
            for name in ("gold_mean", "kl_from_sft", "entropy", "distinct", "forward_kl",
                         "reverse_kl", "length_mean"):
                assert math.isfinite(r[name]), (r["method"], name)
            assert r["kl_from_sft"] > -1 and 0 < r["distinct"] <= 1 and r["n"] == 1
            if r["method"] not in ("spin", "irft", "dpo"):
                assert math.isfinite(r["proxy_mean"])
    rewards = afd.LISTS["rewards"]
    assert set(run[1]["curves"]["0"]) == {
        "po init-sft 0.3", *(f"po {model} 1" for model in rewards),
        *(f"{method} {name}" for method in ("adversarial", "adversarial-exact")
          for name in ("reverse_kl", "forward_kl", "jensen_shannon"))}
    for curve in run[1]["curves"]["0"].values():
        known = {"step", "proxy", "kl_from_sft", "entropy", "length", "golden", "demo_logp"}
        assert len(curve) == 2 and all(known <= set(step) for step in curve)
        assert all(math.isfinite(value) for step in curve for value in step.values())
        assert abs(curve[0]["kl_from_sft"]) < 1e-3      # the first samples are pi_SFT's own


def test_the_same_seed_gives_the_same_results(run, tmp_path):
    """A difference here means an unseeded draw somewhere: no number could be reproduced."""
    out = str(tmp_path / "b")
    again = afd.main([*SMALL, *EVERYTHING, "--seed", "1", "--out", out])
    assert untimed(again["rows"]) == untimed(r for r in run[1]["rows"] if r["seed"] == 1)
    assert again["reward_models"] == [r for r in run[1]["reward_models"] if r["seed"] == 1]


def test_a_stage_s_randomness_is_its_own(run, tmp_path):
    """--init with the checkpoint that the run itself wrote, and no methods: the rows they share are
    the same. Otherwise leaving a stage out would change all later ones, and no two runs compare."""
    init = str(run[0] / "seed1" / "init")
    again = afd.main([*SMALL, "--heterogeneity", "0.5", "--seed", "1", "--init", init, "--methods",
                      "none", "--out", str(tmp_path / "b")])
    assert "pretrain" not in again["seconds"]["1"]
    assert again["rows"] == [r for r in run[1]["rows"]
                             if r["seed"] == 1 and r["method"] not in afd.METHODS]
    assert again["reward_models"] == [r for r in run[1]["reward_models"] if r["seed"] == 1]


def test_labels_alone(run, tmp_path):
    """Preferences without any discriminator, half of them swapped: DPO and policy optimisation."""
    init = str(run[0] / "seed0" / "init")
    results = afd.main([*SMALL, "--heterogeneity", "0.5", "--init", init, "--rewards", "preference",
                        "--methods", "dpo,po", "--optimise", "preference", "--policy-steps", "1",
                        "--label-noise", "0.5", "--out", str(tmp_path / "b")])
    ours = [(r["method"], r["reward_model"]) for r in results["rows"] if r["method"] in afd.METHODS]
    assert ours == [("po", "preference"), ("dpo", None)]


def test_label_noise_swaps_its_share():
    """2,000 pairs of a golden reward that is the response's length: a share of 0.3 is reversed
    (standard error 1%, margin four of them), and 0 and 1 reverse none and all."""
    def world(preferences=()):
        return types.SimpleNamespace(preferences=preferences, text=str,
                                     golden=lambda prompt, response: len(response))
    samples = [([0], [0] * k) for _ in range(2000) for k in (1, 2)]

    def swapped(noise):
        s = afd.Settings(label_noise=noise)
        items = afd.preference_items(world(), s, afd.Run(Path(), 0, "cpu"), ["x"] * 2000, samples)
        return sum(len(better[1]) < len(worse[1]) for better, worse in items) / len(items)
    assert swapped(0.0) == 0 and swapped(1.0) == 1 and abs(swapped(0.3) - 0.3) < 0.041


def test_self_play_on_marked_demonstrations_has_finite_losses(run, tmp_path):
    """At heterogeneity 1 every demonstration holds <|unk|>, which no policy can write: a log-ratio
    of -inf - -inf there would make every weight nan."""
    init = str(run[0] / "seed0" / "init")
    results = afd.main([*SMALL, "--heterogeneity", "1", "--init", init, "--rewards", "log-ratio",
                        "--methods", "spin,dpo", "--out", str(tmp_path / "b")])
    records = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").open()]
    losses = [r[key] for r in records if r["stage"] == "spin" for key in ("loss", "held_out")
              if key in r]
    assert len(losses) > 4 and all(math.isfinite(loss) for loss in losses)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)      # it starts at its reference
    spin = next(r for r in results["rows"] if r["method"] == "spin")
    assert math.isfinite(spin["kl_from_sft"]) and math.isfinite(spin["reverse_kl"])


def test_one_s_own_data(tmp_path, capsys):
    """Dialogues in, agreement with the human choice out; golden empty where nobody knows it."""
    rows = [{"chosen": f"\n\nHuman: say {i}\n\nAssistant: yes {i}",
             "rejected": f"\n\nHuman: say {i}\n\nAssistant: no"} for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "p.txt").write_text("more?\n" + "long " * 300)
    argv = [*SMALL, "--demos", str(tmp_path / "d.jsonl"), "--prompts", str(tmp_path / "p.txt"),
            "--vocab-size", "300", "--max-prompt", "40", "--max-response", "8",
            "--policy-steps", "2", "--methods", "all"]
    results = afd.main([*argv, "--out", str(tmp_path / "o")])
    assert "1 prompt longer than 40 tokens cut to the end" in capsys.readouterr().out
    assert all(r["gold_mean"] is None for r in results["rows"]) and results["summary"] is None
    for record in results["reward_models"]:
        assert 0 <= record["human_agreement"] <= 1 and record["human_pairs"] == 12
    json.loads((tmp_path / "o" / "results.json").read_text(), parse_constant=pytest.fail)
    (tmp_path / "g.py").write_text("def g(x, y):\n    return len(y)\n")
    results = afd.main([*argv, "--gold", f"{tmp_path}/g.py:g", "--out", str(tmp_path / "o2")])
    assert all(r["gold_mean"] is not None for r in results["rows"])


def test_mean_and_difference_over_seeds_are_those_of_the_rows(run):
    rows, summary = run[1]["rows"], run[1]["summary"]

    def gold(seed, model):
        return next(r["gold_mean"] for r in rows
                    if (r["seed"], r["reward_model"], r["n"]) == (seed, model, 4))
    assert summary["methods"]["init-sft"]["gold"][0] == pytest.approx(
        (gold(0, "init-sft") + gold(1, "init-sft")) / 2)
    difference = next(d for d in summary["differences"]
                      if (d["a"], d["b"]) == ("init-sft", "init-demo"))
    assert difference["mean"] == pytest.approx(
        sum(gold(k, "init-sft") - gold(k, "init-demo") for k in (0, 1)) / 2)
    assert summary["methods"]["golden"]["share_of_golden_gain"][0] == pytest.approx(1)
    assert summary["methods"]["sft"]["share_of_golden_gain"][0] == 0


def test_held_out_prompts_are_held_out_with_all_their_answers(tmp_path):
    """Otherwise own data would be judged on prompts whose answers were trained on."""
    rows = [{"prompt": f"ask {i}", "response": f"say {i} {j}"} for i in range(20) for j in range(5)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "p.txt").write_text("".join(f"ask {i}\n" for i in range(20)))
    s = afd.Settings(demos=str(tmp_path / "d.jsonl"), prompts=str(tmp_path / "p.txt"),
                     vocab_size=300)
    world = afd.file_world(s, 0)
    assert len(world.test_prompts) == len(set(world.test_prompts)) == 4 == len(world.test_demos)
    assert not set(world.test_prompts) & set(world.train_prompts)
    assert not set(world.test_prompts) & {x for x, _ in world.demos}


def test_preference_calibration_takes_both_orders():
    """A Bradley-Terry model that is right as often as it says has (nearly) no calibration error."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4000))
    first = rng.random(4000) < 1 / (1 + np.exp(b - a))
    rewards = {0.0: 0}

    def reward(batch):
        return torch.tensor([rewards[int(row[0])] for row in batch.tokens])
    rewards = dict(enumerate([*np.where(first, a, b), *np.where(first, b, a)]))
    items = [(([i], [0]), ([i + 4000], [0])) for i in range(4000)]
    assert held_out_quality(reward, items, "preference", "cpu")["calibration_error"] < 0.03


BAD = [["--heterogeneity", "1.5"], ["--heterogeneity", "nan"], ["--task", "useless"], ["--nope"],
       ["--seeds", "0"], ["--n-candidates", "3"], ["--n-head", "5"], ["--vocab-size", "-1"],
       ["--sft-epochs", "nan"], ["--device", "cpu:x"], ["--gold", "x.py:f"],
       ["--demos", "gone.jsonl"], ["--device", "tpu"],
       ["--demos", "one.jsonl"], ["--demos", "long.jsonl", "--max-prompt", "1"],
       ["--demos", "ok.jsonl", "--gold", "gone.py:f"],
       ["--demos", "ok.jsonl", "--gold", "bad.py:f"],
       ["--demos", "ok.jsonl", "--corpus", "gone.txt"],
       ["--methods", "nope"], ["--methods", "po,nope"], ["--rewards", "golden"],
       ["--optimise", "golden"], ["--rewards", "init-sft", "--optimise", "log-ratio"],
       ["--divergences", "nope"], ["--betas", "0"], ["--betas", "x"], ["--betas", ""],
       ["--betas", "1,-1"], ["--betas", "nan"], ["--label-noise", "2"], ["--label-noise", "nan"],
       ["--label-smoothing", "-1"], ["--group", "1"], ["--policy-steps", "0"], ["--rounds", "0"],
       ["--init", "gone"], ["--ppo-clip", "1"], ["--ppo-clip", "nan"], ["--reward-clip", "0"],
       ["--pair-beta", "inf"]]
if not torch.cuda.is_available():
    BAD.append(["--device", "cuda"])


@pytest.mark.parametrize("argv", BAD, ids=lambda argv: " ".join(argv))
def test_bad_input_is_refused_before_anything_is_written(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"a fairly long prompt, the {i}th", "response": "y"}) + "\n"
            for i in range(20)]
    for name, count in (("one", 1), ("long", 20), ("ok", 20)):
        (tmp_path / f"{name}.jsonl").write_text("".join(rows[:count]))
    (tmp_path / "bad.py").write_text("def f(x, y):\n    return None\n")
    with pytest.raises(InputError) as error:
        afd.main([*argv, "--out", "fresh"])
    assert "\n" not in str(error.value) and not (tmp_path / "fresh").exists()


def test_a_folder_with_another_run_is_refused(run):
    with pytest.raises(InputError, match="another run"):
        afd.main([*SMALL, "--out", str(run[0])])
    assert (run[0] / "results.json").exists()


def test_from_the_shell_bad_input_is_one_line_and_status_2(tmp_path):
    got = subprocess.run([sys.executable, str(ROOT / "afd.py"), "--task", "useless"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert got.returncode == 2 and got.stdout == ""
    assert got.stderr.startswith("error: ") and got.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_wider_policy_learns_at_a_lower_rate():
    """Rates of width 64 would wreck GPT-2's weights at its 768: a twelfth of them is left."""
    s = parse_settings(afd.Settings, [])
    narrow, wide = afd.schedules(s), afd.schedules(dataclasses.replace(s, n_embd=768))
    assert narrow["sft"].lr == 1e-3 and {*narrow} == {*wide}
    assert all(wide[name].lr == pytest.approx(plan.lr / 12) for name, plan in narrow.items())
    assert afd.schedules(dataclasses.replace(s, n_embd=16)) == narrow
