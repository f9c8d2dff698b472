"""The README promises what there is: its programs run, its tables name what exists. Links, commands
and the numbers of its tables and sentences are looked up in test_lessons.py."""

import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import afd
from utils.cli import parse_settings
from utils.data import read_examples, read_prompts

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
spec = importlib.util.spec_from_file_location("results", ROOT / "docs" / "results.py")
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)
DATA = json.loads(results.COLLECTED.read_text(encoding="utf-8"))


# ---- the page ------------------------------------------------------------------------------------

def test_the_page_is_short():
    """Somebody who opens the project shall find the method, not everything about it."""
    assert README.count("\n") < 300


def test_the_library_program_runs(tmp_path, monkeypatch, capsys, one_thread):
    """The method in 25 lines, as it stands there: the reward prefers what pi_SFT writes more often
    than pi_0 does, and best-of-16 picks such an answer. Then the saved models score and write."""
    method, saved = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in method.splitlines() if line.strip()]) <= 25
    assert max(map(len, (method + saved).splitlines())) <= 100
    monkeypatch.chdir(tmp_path)
    exec(method, found := {})
    assert capsys.readouterr().out.strip() in found["answers"]
    x, tok, score = found["xs"][0], found["tok"], found["score"]
    helpful, other = (score(found["reward"], [(x, [*tok.encode(y), tok.eos]) for y in ys]).mean()
                      for ys in (found["answers"][:3], ["No.", "Ask my aunt.", "I forget."]))
    assert helpful > other
    exec(saved, found)
    scores, text = capsys.readouterr().out.strip().split("\n", 1)
    written = score(found["reward"], [found["tok"].encode_pair(found["x"], y, 32, 32)
                                      for y in ("Take your time.", "No.")])
    assert scores == str(written) and text


def test_example_records_are_read(tmp_path):
    """The README's three forms of a FILE, as they stand there, and its rule for --prompts."""
    lines = re.search(r"one record a line:\n\n```\n(.*?)```", README, re.S)[1]
    (tmp_path / "demos.jsonl").write_text(lines)
    (tmp_path / "plain.txt").write_text("An egg?\nTwo?\n")
    examples, forms, left_out = read_examples(tmp_path / "demos.jsonl")
    assert len(examples) == len(forms) == 3 and not left_out
    assert [bool(e.rejected) for e in examples] == [False, False, True]
    assert all("egg" in e.prompt.lower() and "Ten minutes" in e.response for e in examples)
    (tmp_path / "p.jsonl").write_text(lines.splitlines()[0])
    assert [len(read_prompts(tmp_path / name)) for name in ("plain.txt", "p.jsonl")] == [2, 1]


def test_flags_named_in_sentences_exist():
    """test_lessons.py parses whole commands; a sentence names a flag alone."""
    known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(afd.Settings)}
    named = set(re.findall(r"`(--[a-z-]+)", README))
    assert {"--out", "--resume", "--fast", "--init", "--gold", "--corpus", "--head"} <= named
    assert named <= known, named - known


def test_the_demo_is_printed_in_today_s_format():
    """Each row that is shown is one that `python afd.py` prints today, with the name it has today;
    the text before a stage's colon too."""
    shown = re.search(r"## What you will see.*?```\n(.*?)```", README, re.S)[1]
    rows = re.findall(r"^(\S.*?) +-?\d+\.\d\d\+-", shown, re.M)
    known = {"pi_0", "pi_SFT", "demonstrations", *(row["name"] for row in DATA["rows"])}
    assert len(rows) > 8 and set(rows) <= known, set(rows) - known
    source = (ROOT / "afd.py").read_text(encoding="utf-8")
    for stage in re.findall(r"^  (\d [\w -]+): ", shown, re.M):
        method = stage.removeprefix("6 ")
        assert f'"{stage}: ' in source or method in parse_settings(afd.Settings, []).methods, stage


def test_files_and_equations_lead_somewhere():
    """Each row of the table of files names files; each row from equation to function to test names
    things that exist. A module of the project that the page forgets shows here, too."""
    named = set(re.findall(r"`([\w/]+\.(?:py|md))`", README))
    assert all((ROOT / name).is_file() for name in named), named
    modules = {path.relative_to(ROOT).as_posix() for folder in (ROOT, ROOT / "utils")
               for path in folder.glob("*.py")} - {"utils/__init__.py"}
    assert modules <= named, modules - named
    rows = re.findall(r"^\| .* \| (`[\w.]+`.*) \| `(test_\w+)` \|$", README, re.M)
    assert len(rows) >= 10
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for functions, test in rows:
        assert f"def {test}(" in written, test
        for name in re.findall(r"`([\w.]+)`", functions):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


# ---- the package ---------------------------------------------------------------------------------

def test_an_installation_has_every_module():
    """`pip install -e .` takes what pyproject.toml lists: the five modules, both packages, the
    page's template, and versions that requirements.txt is one of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]
    assert set(listed["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    assert {f"{name}.py" for name in listed["py-modules"]} == {
        "afd.py", "divergences.py", "model.py", "reward.py", "train.py"}
    assert set(listed["packages"]) == {"toy_envs", "utils"}
    assert all((ROOT / name / "__init__.py").is_file() for name in listed["packages"])
    data = {path.name for path in (ROOT / "utils").iterdir()
            if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert set(listed["package-data"]["utils"]) == data
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    ranges = {r.name: r.specifier for r in map(Requirement, project["project"]["dependencies"])}
    assert ranges.keys() == pins.keys()
    assert all(pins[name] in ranges[name] for name in pins)


# ---- docs/results.py -----------------------------------------------------------------------------

def test_pages_are_made_without_a_run(monkeypatch, tmp_path):
    """`python docs/results.py pages` fills the tables again with what is committed; `collect` where
    no run is leaves the committed results as they are."""
    pages, drawn = [tmp_path / page.name for page in results.PAGES], []
    for page, copy in zip(results.PAGES, pages):
        copy.write_text(re.sub(r"\d\.\d\d ± ", "7.77 ± ", page.read_text(encoding="utf-8")))
    monkeypatch.setattr(results, "PAGES", pages)
    monkeypatch.setattr(results, "RUNS", tmp_path)
    monkeypatch.setattr(results, "figures", lambda *args: drawn.append(args))
    monkeypatch.setattr(results.sys, "argv", ["results.py", "pages"])
    before = results.COLLECTED.read_bytes()
    with pytest.raises(SystemExit, match=r"results.md: -?7.77 ± "):    # A sentence is not filled in.
        results.main()
    for page, copy in zip((ROOT / "README.md", ROOT / "docs" / "results.md"), pages):
        tables = [re.findall(r"^<!-- cells.*\n(?:\|.*\n)+", path.read_text(encoding="utf-8"), re.M)
                  for path in (page, copy)]
        assert tables[0] == tables[1] != []
    assert len(drawn) == 1
    monkeypatch.setattr(results.sys, "argv", ["results.py", "collect"])
    with pytest.raises(SystemExit, match="left as it was"):
        results.main()
    assert results.COLLECTED.read_bytes() == before


def test_every_run_of_the_results_is_a_command_with_five_seeds():
    """`make results` must not fail an hour in, at a flag that afd.py refuses; a pi_0 that a run
    starts from is one that an earlier run trains; and no group of the committed results is one that
    it does not run."""
    groups = results.groups()
    for group, flags in groups.items():
        afd.check(parse_settings(afd.Settings, shlex.split(flags)))
        first = results.teacher(group)
        assert results.teacher(first) == first in groups
    seeds = {}
    for row in DATA["rows"]:
        seeds.setdefault(row["group"], set()).add(row["seed"])
    assert set(groups) <= set(seeds)
    assert all(any(group.startswith((name, "exact-")) for name in groups) for group in seeds)
    assert all(mine == set(results.SEEDS) for mine in seeds.values())


def test_a_run_starts_from_the_pi_0_of_its_own_base_task_and_seed(monkeypatch, tmp_path):
    """The command of a run with marks: no pi_0 of another language may slip in."""
    calls = []
    monkeypatch.setattr(results, "RUNS", results.ROOT / "out" / "results")
    monkeypatch.setattr(results, "start_one", lambda *args: calls.append(args[-1]))
    results.run("idle-harmless-h1", 3)
    words = calls[0]
    flags = parse_settings(afd.Settings, words[1:])
    assert flags.init == "out/results/idle-harmless-h0-s3/seed3/init"
    assert (flags.base, flags.task, flags.heterogeneity, flags.seed) == ("idle", "harmless", 1, 3)
    results.run("good-helpful-h0", 0)
    assert "--init" not in calls[1]


def test_collecting_takes_finished_groups_alone(monkeypatch, tmp_path, capsys):
    """Five seeds of one group, two of another: the first is collected, the second named."""
    first, second, *_ = results.groups()
    for group, n in ((first, 5), (second, 2)):
        for seed in range(n):
            run = {"command": "c", "versions": {}, "seconds": {str(seed): {"a": 1.0, "b": 2.2}},
                   "best_of_n": [], "reward_models": [],
                   "rows": [{"seed": seed, "name": "pi_SFT", "golden": 1 / 3}],
                   "curves": {str(seed): {"po init-sft 0.3": [
                       {"step": step, "proxy": 1.0, "kl": 0.0, "entropy": 2.0, "golden": step,
                        "length": 3} for step in range(20)], "dpo": [{"step": 0, "loss": 1.0}]}}}
            (tmp_path / f"{group}-s{seed}").mkdir()
            (tmp_path / f"{group}-s{seed}" / "results.json").write_text(json.dumps(run))
            (tmp_path / "sweeps").mkdir(exist_ok=True)
            row = {"group": f"{group}-floors", "seed": seed, "name": "pi_SFT", "golden": 2 / 3}
            (tmp_path / "sweeps" / f"{group}-s{seed}.json").write_text(json.dumps([row]))
    monkeypatch.setattr(results, "RUNS", tmp_path)
    monkeypatch.setattr(results, "COLLECTED", tmp_path / "results.json")
    results.collect()
    data = json.loads((tmp_path / "results.json").read_text())
    assert set(data["runs"]) == {first} and f"{second} is left out" in capsys.readouterr().out
    assert data["runs"][first]["seconds"] == {str(seed): 3 for seed in range(5)}
    assert [(row["group"], row["golden"]) for row in data["rows"]] == (
        5 * [(first, 0.33333)] + 5 * [(f"{first}-floors", 0.66667)])
    assert [(c["name"], c["golden"]) for c in data["curves"]] == 5 * [
        ("policy optimisation, init-sft 0.3", 4.5), ("policy optimisation, init-sft 0.3", 14.5)]


def test_figures_are_drawn(tmp_path):
    results.figures(DATA, tmp_path)
    names = {"best_of_n_h0.png", "best_of_n_h1.png", "best_of_n_idle.png", "frontier.png",
             "heterogeneity_sweep.png", "sft_quality.png", "floors.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert names <= {path.name for path in (ROOT / "docs" / "figures").iterdir()}
