"""The README promises what the committed results hold: every number, link and command in it."""

import json
import re
import shlex
from pathlib import Path

import pytest

import afd
import train
from toy_envs.truth import summarise

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = {path.stem: json.loads(path.read_text())
           for path in (ROOT / "docs" / "results").glob("*_h?_*.json")}


def table(name):
    """Rows of the README's table between <!-- name --> and <!-- end -->: lists of cells."""
    block = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", README, re.S).group(1)
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")]
            for line in block.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


def result_of(label):
    """The committed run of a column: "last, h = 1" is helpful's, "harmless, h = 0" has the sum."""
    what, h = re.fullmatch(r"(\w+), h = (\d)", label).groups()
    task, head = ("helpful", what) if what in ("sum", "last") else (what, "sum")
    run = RESULTS[f"{task}_h{h}_{head}"]
    assert run["config"]["task"] == task and run["config"]["head"] == head
    assert run["config"]["heterogeneity"] == int(h) and len(run["summary"]["seeds"]) >= 5
    return run["summary"]


@pytest.mark.parametrize("name, read, form", [
    ("SHARES", lambda s, row: [round(100 * v) for v in s["methods"][row]["share_of_golden_gain"]],
     "{}% ± {}"),
    ("POINTS", lambda s, row: s["methods"][row]["gold"], "{:.2f} ± {:.2f}"),
    ("DIFFS", lambda s, row: next([d["mean"], d["ci95"]] for d in s["differences"]
                                  if f"{d['a']} − {d['b']}" == row), "{:.2f} ± {:.2f}"),
])
def test_tables_are_the_committed_results(name, read, form):
    header, *rows = table(name)
    assert len(rows) >= 5
    for row in rows:
        for label, cell in zip(header[1:], row[1:]):
            assert cell == form.format(*read(result_of(label), row[0])), (row[0], label)


def test_summaries_are_those_of_their_rows():
    """A summary edited by hand, or made by older code, would no longer follow from the rows."""
    for run in RESULTS.values():
        again = json.loads(json.dumps(summarise(run["rows"], run["summary"]["n"])))
        for name, method in again["methods"].items():
            assert method["gold"] == pytest.approx(run["summary"]["methods"][name]["gold"])
        for a, b in zip(again["differences"], run["summary"]["differences"]):
            assert (a["a"], a["b"]) == (b["a"], b["b"]) and a["mean"] == pytest.approx(b["mean"])


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
            train.parse_settings(train.Settings, flags[1:])
        seen += 1
    assert seen >= 6
    for module in re.findall(r"python -m (toy_envs\.\w+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
