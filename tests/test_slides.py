"""What a lecturer projects and prints: the deck is made from its Markdown, its numbers are those of
the results, its minutes make an hour, and the cheat sheet's formulas are those of the code."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import torch

from divergences import DIVERGENCES
from reward import REWARD_MODELS
from utils.evaluate import mean_ci

DOCS = Path(__file__).resolve().parent.parent / "docs"


def module_at(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make, results = module_at(DOCS / "slides" / "make.py"), module_at(DOCS / "results.py")
SOURCE = (DOCS / "slides" / "deck.md").read_text(encoding="utf-8")
COMMITTED = (DOCS / "slides" / "deck.html").read_text(encoding="utf-8")
SHEET = (DOCS / "cheat_sheet.html").read_text(encoding="utf-8")
DATA = json.loads(results.COLLECTED.read_text(encoding="utf-8"))
MINUTES = [int(minutes) for minutes in re.findall(r"^Notes, (\d+) minutes?:$", SOURCE, re.M)]


# ---- the deck ------------------------------------------------------------------------------------

def test_the_committed_deck_is_what_the_script_makes():
    """Words, numbers and figures. A failure: run `python docs/slides/make.py` once more."""
    assert make.make(SOURCE, DATA) == COMMITTED


def test_the_deck_needs_the_standard_library_alone(tmp_path):
    """A copy without our modules, by a Python that sees no package (-S), makes the same deck."""
    folder = tmp_path / "docs" / "slides"
    (folder / "figures").mkdir(parents=True)
    (tmp_path / "docs" / "results.json").write_bytes(results.COLLECTED.read_bytes())
    for file in [*DOCS.glob("slides/*.*"), *DOCS.glob("slides/figures/*.svg")]:
        if file.suffix != ".html" or file.name == "template.html":
            (tmp_path / "docs" / file.relative_to(DOCS)).write_bytes(file.read_bytes())
    subprocess.run([sys.executable, "-I", "-S", folder / "make.py", "text"], check=True)
    assert (folder / "deck.html").read_text(encoding="utf-8") == COMMITTED


@pytest.mark.parametrize("page", [COMMITTED, SHEET], ids=["deck", "cheat sheet"])
def test_a_page_opens_without_a_network(page):
    """Nothing is fetched, by no element, style or program; the deck fits into a mail."""
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)|url\(|@import|fetch\(|<link", page)
    assert len(page.encode()) < 1_500_000


def test_slides_have_notes_and_make_an_hour():
    """Ten minutes of the hour are left for questions; five are for what inverse RL is."""
    slides = re.split(r"^---$", SOURCE, flags=re.M)
    assert len(MINUTES) == len(slides) == COMMITTED.count("<section") and 13 <= len(slides) <= 16
    assert 48 <= sum(MINUTES) <= 52 and MINUTES[1] + MINUTES[2] == 5
    for slide in slides:
        shown, _, notes = re.split(r"^Notes, (\d+) minutes?:$", slide, flags=re.M)
        assert shown.strip().startswith("# ") and len(notes.split()) > 20, shown
        assert len(shown.split()) < 140, "too much text for the back of a room"


def test_the_plan_of_the_hour_is_the_deck():
    """teaching.md's table: every slide once, and the minutes of the deck."""
    text = (DOCS / "teaching.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|[^|]*\| (?:(\d+)–(\d+))? ?\|", text, re.M)
    assert sum(int(minutes) for minutes, *_ in rows) == 60
    planned = [(int(minutes), range(int(first) - 1, int(last))) for minutes, first, last in rows
               if first]
    assert [n for _, slides in planned for n in slides] == [*range(len(MINUTES))]
    assert all(minutes == sum(MINUTES[n] for n in slides) for minutes, slides in planned)


def test_slides_type_no_number_of_a_run():
    """Decimals come from results.json; what is typed may only be a setting, as in e^(r/0.3)."""
    typed = re.sub(r"{.+?}|```.+?```|!\[.+?\)", "", SOURCE, flags=re.S)
    assert set(re.findall(r"\d+\.\d+|±", typed)) <= {"2405.15624", "0.3"}


def test_numbers_are_those_of_the_tables():
    """make.py has the mean and Student's t again, because it needs no package: same cells."""
    keys = re.findall(r"{(\S+) (\S+): (.+?)}", SOURCE)
    for group, column, row in keys:
        cell = results.cell(DATA, row, f"{group} {column} ±").replace("-", "−")
        assert make.number(DATA, group, column, row) == cell
    assert len(keys) > 10
    with pytest.raises(SystemExit, match="0 seeds"):
        make.number(DATA, "good-helpful-h0", "golden", "best of 16, nothing")


@pytest.mark.parametrize("source, html", [
    ("# A *b* < c", "<h2>A *b* &lt; c</h2>"),
    ("one\ntwo `x < y` **z**", "<p>one\ntwo <code>x &lt; y</code> <strong>z</strong></p>"),
    ("```\na\n\n**b**\n```\nc", "<pre>a\n\n**b**</pre>\n<p>c</p>"),
    ("- a\n- b\n  c", "<ul>\n<li>a</li>\n<li>b\n  c</li>\n</ul>"),
    ("1. a\n2. b", "<ol>\n<li>a</li>\n<li>b</li>\n</ol>"),
    ("> a\n>\n> - b", "<blockquote><p>a</p>\n<ul>\n<li>b</li>\n</ul></blockquote>"),
    ("| a | b |\n|---|---|\n| c | |",
     "<table><tr><th>a</th><th>b</th></tr>\n<tr><td>c</td><td></td></tr>\n</table>")])
def test_markdown_becomes_html(source, html):
    assert make.render(source) == html


def test_figures_are_drawn_again(tmp_path):
    """The same results give the same file, others another one; and letters are drawn as shapes, so
    that no font is asked of the machine that projects."""
    figures = module_at(DOCS / "slides" / "figures.py")
    other = {**DATA, "best_of_n": [{**p, "golden": -p["golden"]} for p in DATA["best_of_n"]]}
    drawn = []
    for data in (DATA, DATA, other):
        figures.draw_best_of_n(data, "good-helpful-h1", hidden=False).savefig(
            tmp_path / "x.svg", metadata={"Date": None})
        drawn.append((tmp_path / "x.svg").read_text())
    assert drawn[0] == drawn[1] != drawn[2] and "<text" not in drawn[0]


# ---- what the slides say in words ----------------------------------------------------------------

SENTENCES = [   # slide, group, a, b: a has more golden reward than b, the interval excludes zero
    (12, "good-helpful-h1", "best of 16, init-sft", "demonstrations"),
    (12, "good-helpful-h1", "best of 16, random", "best of 16, init-demo"),
    (12, "good-helpful-h1", "best of 16, random", "best of 16, sft-demo"),
    (14, "good-helpful-h0", "best of 16, likelihood per token", "demonstrations"),
    (14, "idle-helpful-h0", "best of 16, random", "best of 16, likelihood per token"),
    (14, "idle-helpful-h0", "best of 16, init-sft", "best of 16, random"),
    (15, "good-helpful-h0", "pi_0", "closed form, log-ratio 0.3"),
    (15, "good-helpful-h0", "closed form, floored 0.3", "best of 16, log-ratio")]


@pytest.mark.parametrize("slide, group, a, b", SENTENCES)
def test_what_slides_say_came_out(slide, group, a, b):
    """New results may overturn a sentence: then rewrite that slide, not this test."""
    mean, half = mean_ci(results.difference(DATA, group, a, b))
    assert mean - half > 0, f"slide {slide}: {a} is above {b}"


def test_who_promises_most_picks_worst():
    """Slide 12: the order of the three by their own rise is the reverse of that by golden."""
    at = {(p["reward_model"], p["n"], p["seed"]): p for p in DATA["best_of_n"]
          if p["group"] == "good-helpful-h1"}
    names = ("init-sft", "init-demo", "sft-demo")
    rise, golden = ({x: sum(at[x, 16, k][key] - at[x, 1, k][key] for k in range(5)) for x in names}
                    for key in ("proxy", "golden"))
    assert sorted(names, key=rise.get) == sorted(names, key=golden.get)[::-1] == list(names)


# ---- the cheat sheet -----------------------------------------------------------------------------

def table(name):
    """The cells of one table of the cheat sheet, a list for each line but the first."""
    [body] = re.findall(rf'<table id="{name}">(.*?)</table>', SHEET, re.S)
    return [[unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<td.*?>(.*?)</td>", line)]
            for line in re.findall(r"<tr>(.*?)</tr>", body)[1:]]


def value(formula, **names):
    """A formula as it is printed: "(u − 1)²/u", "u log u", "e^(2 h) − 1"."""
    for printed, python in (("−", "-"), ("∞", "inf"), ("√u", "u**0.5"), ("²", "**2"),
                            ("|u - 1|", "abs(u - 1)"), ("e^", "e**")):
        formula = formula.replace(printed, python)
    formula = re.sub(r"log (\w+)", r"log(\1)", formula)
    formula = re.sub(r"([\w)]) (?=[\w(])", r"\1*", formula)     # a product has no sign
    return eval(formula, {"log": math.log, "e": math.e, "inf": math.inf,
                          "sign": lambda x: (x > 0) - (x < 0), **names})


def test_the_sheets_divergences_are_those_of_the_code():
    """Each printed f, f' and price is the code's; r may differ by a constant, so its differences
    are compared, as a policy gradient sees them."""
    rows = {label.split(" (")[0]: cells for label, *cells in table("divergences")}
    assert rows.keys() == {d.label for d in DIVERGENCES.values()}
    h = torch.tensor([-1.3, -0.4, 0.2, 0.9, 2.1], dtype=torch.float64)
    for d in DIVERGENCES.values():
        f, f_prime, reward, foreign, missed, _ = rows[d.label]
        for printed, ours in ((f, d.f), (f_prime, d.f_prime)):
            assert [value(printed, u=x.exp().item()) for x in h] == pytest.approx(ours(h).tolist())
        r = torch.tensor([value(reward, h=x) for x in h.tolist()], dtype=torch.float64)
        assert (r - r[0]).tolist() == pytest.approx((d.reward(h) - d.reward(h)[0]).tolist())
        assert value(foreign) == pytest.approx(d.f_at_zero)
        assert value(missed) == pytest.approx(DIVERGENCES[d.dual].f_at_zero)


def test_the_sheet_names_every_reward_model():
    """In the code's order, each with the two sources that its name says."""
    rows = [[cell.split(",")[0] for cell in row] for row in table("reward-models")]
    assert [row[0] for row in rows] == list(REWARD_MODELS)
    sources = {"init": "y ~ pi_0", "sft": "y ~ pi_SFT", "demo": "demonstrations"}
    assert [row[1:3] for row in rows[:3]] == [[sources[x] for x in row[0].split("-")]
                                             for row in rows[:3]]
