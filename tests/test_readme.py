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
from utils.data import read_examples, read_prompts

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
        assert results.fill(text, {name: results.tables(DATA)[name]}, DATA) == text


def test_quoted_numbers_are_the_committed_results():
    """Every interval of README's prose names where it comes from, and says what stands there."""
    prose = re.sub(r"^\|.*", "", README, flags=re.M)
    found = re.findall(r"[-\d.%]+ ± [\d.%]+(<!-- = .+? -->)?", prose)
    assert len(found) > 15 and all(found)
    wrong = re.sub(r"[\d.]+( ± [\d.%]+<!-- = )", r"77\1", README)
    assert wrong != README == results.fill(wrong, {}, DATA)


@pytest.mark.parametrize("recipe, rows, says", [
    ("golden a: x", [(1.0, 0), (3.0, 1)], "2.00 ± 12.71"),      # t of one degree of freedom
    ("golden a: x less y", [(1.0, 0), (3.0, 1)], "0.00 ± 0.00"),
    ("golden a: x of 64", [(1.0, 0)], "–")])
def test_what_a_recipe_stands_for(recipe, rows, says):
    """Two seeds of a writer x, and of its twin y; best-of-64 was not run."""
    data = {"rows": [{"group": "a", "method": "bon", "reward_model": name, "beta": None, "n": 16,
                      "seed": seed, "gold_mean": gold} for gold, seed in rows for name in "xy"]}
    assert results.quoted(data, recipe) == says
    assert results.quoted(DATA, "share helpful-h0: golden") == "100% ± 0%"


def test_pages_are_made_without_a_run(monkeypatch, tmp_path):
    """`python docs/results.py pages` writes what is committed; `collect` where no run is leaves the
    committed results as they are."""
    pages, drawn = [tmp_path / page.name for page in results.PAGES], []
    for page, copy in zip(results.PAGES, pages):
        text = re.sub(r"(<!-- [A-Z]\w*.*? -->\n).*?(<!-- end -->)", r"\1\2",
                      page.read_text(encoding="utf-8"), flags=re.S)
        copy.write_text(text, encoding="utf-8")
    monkeypatch.setattr(results, "PAGES", pages)
    monkeypatch.setattr(results, "RUNS", tmp_path)
    monkeypatch.setattr(results, "figures", lambda *args: drawn.append(args))
    monkeypatch.setattr(results.sys, "argv", ["results.py", "pages"])
    before = results.COLLECTED.read_bytes()
    results.main()
    assert [page.read_text(encoding="utf-8") for page in pages] == [
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md")]
    assert len(drawn) == 1
    monkeypatch.setattr(results.sys, "argv", ["results.py", "collect"])
    with pytest.raises(SystemExit, match="left as it was"):
        results.main()
    assert results.COLLECTED.read_bytes() == before


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


def test_example_records_are_read(tmp_path):
    """The README's three forms of a FILE, as they stand there, and its rule for --prompts."""
    lines = re.search(r"one record a line:\n\n```\n(.*?)```", README, re.S)[1]
    (tmp_path / "demos.jsonl").write_text(lines)
    (tmp_path / "plain.txt").write_text("An egg?\nTwo?\n")
    examples, left_out = read_examples(tmp_path / "demos.jsonl")
    assert len(examples) == 3 and not left_out and [bool(e.rejected) for e in examples] == [0, 0, 1]
    assert all("egg" in e.prompt.lower() and "Ten minutes" in e.response for e in examples)
    (tmp_path / "p.jsonl").write_text(lines.splitlines()[0])
    assert [len(read_prompts(tmp_path / name)) for name in ("plain.txt", "p.jsonl")] == [2, 1]


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
