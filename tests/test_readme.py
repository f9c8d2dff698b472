"""The README promises what the committed results hold: every number, link and command in it."""

import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

import afd
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
spec = importlib.util.spec_from_file_location("results", ROOT / "docs" / "results.py")
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)
DATA = json.loads(results.COLLECTED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", results.tables(DATA))
def test_tables_are_the_committed_results(name):
    """A number edited by hand, or results of which only the half was committed, shows here."""
    texts = [page.read_text(encoding="utf-8") for page in results.PAGES]
    assert sum(f"<!-- {name} -->" in text for text in texts) == 1
    for text in texts:
        assert results.fill(text, {name: results.tables(DATA)[name]}) == text


def test_every_setting_has_five_seeds():
    seeds = {}
    for row in DATA["rows"]:
        seeds.setdefault(row["group"], set()).add(row["seed"])
    known = {name.rpartition("-s")[0] for name in results.all_runs()}
    assert {"helpful-h0", "helpful-h1", "harmless-h0", "harmless-h1", "last-h0"} <= set(seeds)
    assert set(seeds) <= known
    assert all(len(mine) >= 5 for mine in seeds.values())


def test_figures_are_drawn(tmp_path):
    results.figures(DATA, tmp_path)
    names = {"best_of_n_h0.png", "best_of_n_h1.png", "frontier_h0.png", "frontier_h1.png",
             "heterogeneity_sweep.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert names <= {path.name for path in (ROOT / "docs" / "figures").iterdir()}


def test_every_run_is_a_command_of_afd():
    """`make results` must not fail an hour in, at a flag that afd.py refuses."""
    for name, (flags, base) in results.all_runs().items():
        settings = train.parse_settings(afd.Settings, flags.split())
        afd.check(settings)
        assert base is None or results.all_runs()[base][1] is None, name
        assert name.endswith(f"-s{settings.seed}")


def test_links_lead_somewhere():
    for text in (README, (ROOT / "docs" / "LOG.md").read_text(encoding="utf-8")):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (ROOT / target).exists(), target
    for name in re.findall(r"^\| `([\w/]+\.(?:py|md))`", README, re.M):
        assert (ROOT / name).is_file(), name


def test_commands_parse():
    """Every `python …` line in the README is a command that its script accepts."""
    seen = 0
    for line in re.findall(r"^(python [^#\n]*)", README, re.M):
        _, script, *flags = shlex.split(line)
        if script == "afd.py":
            train.parse_settings(afd.Settings, flags)
        elif script == "train.py":
            train.parse_settings(train.Settings, flags[2 if flags[0] == "data" else 1:])
        seen += 1
    assert seen >= 6
    for module in re.findall(r"python -m (toy_envs\.\w+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()


def test_equations_lead_to_functions_and_tests():
    """Each row of the table from equation to function to test names things that exist."""
    rows = re.findall(r"^\| .* \| (`[\w.]+`.*) \| `(test_\w+)` \|$", README, re.M)
    assert len(rows) >= 10
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for functions, test in rows:
        assert f"def {test}(" in written, test
        for name in re.findall(r"`([\w.]+)`", functions):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name
