"""report.html: it opens offline, text from data stays text, and it shows what the run found.

What is rendered is checked in headless Chromium, where there is one.
"""

import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from toy_envs.text_tasks import MARKS, TextTask
from utils.evaluate import summarise
from utils.plots import COLORS, draw_run, pyplot
from utils.report import (FIGURES, clauses, collect, present, print_reward_models, print_samples,
                          print_table, verdict, write_report)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                                "google-chrome-stable"))), None)
NASTY = ["<script>document.title='owned'</script>", "</script><h1>out</h1>", "a\u2028b\u2029c",
         "<img src=x onerror=\"document.title='owned'\">", "\"quotes' &lt; &amp; \\ <!-- DATA -->",
         "<!--<script>", "  spaces\n\ttoo", "w" * 300]
TAME = [f"tame {i}" for i in range(len(NASTY))]


class Reader(HTMLParser):
    """Tags in order, the text by id, and rows of cells by the id of their table."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.tables = [], {}, {}
        self.id, self.table, self.in_cell = None, None, False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.id = dict(attributes).get("id", self.id)
        if tag == "table":
            self.table = self.tables.setdefault(self.id, [])
        elif tag == "tr":
            self.table.append([])
        elif tag in ("th", "td"):
            self.table[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("th", "td")

    def handle_data(self, data):
        self.texts[self.id] = self.texts.get(self.id, "") + data
        if self.in_cell:
            self.table[-1][-1] += data


def world_of(task=None):
    """The part of a world that a report reads: of a built-in task, or of one's own files."""
    if task is None:
        return SimpleNamespace(parse=None, values=None, unmark=None, golden=None, notes=[])
    return SimpleNamespace(parse=task.parse, values=task.values, unmark=task.unmark,
                           golden=task.golden, notes=[])


def row_of(name, golden, **more):
    """A row of results.json of which most is not known."""
    unknown = dict.fromkeys(("win_vs_sft", "win_vs_demo", "kl", "reverse_kl", "forward_kl",
                             "entropy", "distinct"))
    return {"seed": 0, "name": name, "golden": golden, "golden_ci95": golden and 0.25,
            "proxy": 1.0, **unknown, "length": 20.0, **more}


def record_of(name, **more):
    """What results.json holds of a reward model."""
    return {"seed": 0, "reward_model": name, "accuracy": 0.75, "calibration_error": 0.05,
            "corr_golden": None, "corr_length": 0.1, "marks_worth": None, "human_agreement": None,
            "human_low": None, "human_high": None, "human_pairs": 0, **more}


def content(prompts, world, texts, demos=None, n=8):
    """(results, samples) of a made-up run with random scores: what write_report takes."""
    rng = np.random.default_rng(0)
    samples, known = [], world.golden is not None
    for i, prompt in enumerate(prompts):
        one = {"text": texts[i], "golden": world.golden(prompt, texts[i]) if known else None,
               "proxy": None}
        mine = [texts[(i + k) % len(texts)] for k in range(n)]
        scores = {name: rng.integers(0, 5, n).astype(float).tolist()     # with ties
                  for name in ("init-sft", "log-ratio", "length")}
        if known:
            scores["golden"] = [world.golden(prompt, text) for text in mine]
        samples.append({"prompt": prompt, "candidates": {"text": mine, "scores": scores},
                        "writers": dict.fromkeys(
                            ("pi_0", "pi_SFT", f"best of {n}, init-sft",
                             "policy optimisation, init-sft 0.3", "demonstration"), one)})
    row = row_of(f"best of {n}, init-sft", 1.25 if known else None, golden_ci95=0.5, proxy=3.0,
                 kl=1.8, entropy=9.0)
    policy = {**row, "name": "policy optimisation, init-sft 0.3", "golden_ci95": None,
              "distinct": 0.5}
    learned = record_of("init-sft", calibration_error=float("nan"), corr_length=0.5)
    settings = {"task": "helpful", "heterogeneity": 0.0, "demos": demos, "n_candidates": n,
                "methods": ["po init-sft 0.3"]}
    return {"command": f"python afd.py {demos}", "versions": {"python": "3"}, "golden": "",
            "settings": settings, "seconds": {"0": {}}, "reward_models": [learned],
            "rows": [row, policy],
            "summary": {"n": n, "seeds": [0], "methods": {}}}, samples


def written(folder, *args, **more):
    folder.mkdir(exist_ok=True)
    return write_report(folder, *args, **more).read_text(encoding="utf-8")


def own(folder, texts, demos="mine.jsonl"):
    """A report on one's own files, whose prompts and responses are these texts."""
    world = world_of()
    return written(folder, *content(texts, world, texts, demos), world)


def data_of(page):
    return re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]


def test_text_from_data_is_never_markup(tmp_path):
    """Hostile texts, in prompts, responses, file name and command, leave every tag of the page as
    it is with tame ones; and the script reads them unchanged."""
    page = own(tmp_path / "a", NASTY, demos="<b onclick='x'>&\".jsonl")
    assert Reader(page).tags == Reader(own(tmp_path / "b", TAME)).tags
    assert not set("<\u2028\u2029") & set(data_of(page))
    prompts = json.loads(data_of(page))["prompts"]
    assert [p["prompt"] for p in prompts] == [text.strip() for text in NASTY]
    assert prompts[0]["candidates"] == [[[None, text]] for text in NASTY]
    assert "<dt>command</dt><dd>python afd.py &lt;b onclick=&#x27;x&#x27;&gt;&amp;&quot;" in page


def test_nothing_is_fetched(tmp_path):
    """Or it would not open offline, and would tell others who reads it."""
    (tmp_path / "a").mkdir()
    for name in FIGURES:
        (tmp_path / "a" / name).write_bytes(b"\x89PNG")
    page = own(tmp_path / "a", TAME)
    targets = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert [t for t in targets if t[0] != "#"] == ["data:image/png;base64,iVBORw=="] * 2
    assert all(f'id="{t[1:]}"' in page for t in targets if t[0] == "#")
    assert not re.search(r"https?:|//\w+\.|url\(|@import|fetch\(", page)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline';" in page


def test_tables_say_what_the_rows_hold(tmp_path):
    task = TextTask("helpful")
    prompts = sorted(task.prompts)[:3]
    texts = [task.demonstrate(x, random.Random(0)) for x in prompts]
    page = written(tmp_path, *content(prompts, world_of(task), texts), world_of(task))
    titles, selector, policy = Reader(page).tables["results-title"]
    assert selector == ["best of 8, init-sft", "1.25 ± 0.50", "3.0", "1.8", "9.0", "-", "20"]
    assert titles == ["writer", "golden, points", "proxy, nats", "KL, nats", "entropy, nats",
                      "distinct", "length, tokens"]     # win rates are known of neither row
    assert policy == ["policy optimisation, init-sft 0.3", "1.25", *selector[2:5], "0.50", "20"]
    assert f'style="background:{COLORS["init-sft"]}"' in page
    assert Reader(page).tables["learned-title"] == [
        ["reward model", "accuracy", "correlation with length"], ["init-sft", "0.75", "0.50"]]
    assert "golden, points" not in own(tmp_path / "own", TAME).split("<script")[0]


def run_of(golden=None, agreement=None, marks=None):
    """results of a made-up run of one seed; golden: {row: points}, agreement: {reward model: share
    of people's pairs}, with an interval from 0.15 below to 0.05 above it."""
    names = ["pi_SFT", "demonstrations",
             *(f"best of 16, {name}" for name in ("init-sft", "floored", "golden"))]
    rows = [row_of(name, golden and golden[name]) for name in names]
    curve = [{"seed": 0, "reward_model": name, "n": n, "proxy": float(n), "kl": 0.0,
              "golden": golden and golden[f"best of 16, {name}"]}
             for name in ("init-sft", "floored", "golden") for n in (1, 16)]
    records = [record_of(name, corr_golden=golden and 0.5, marks_worth=marks,
                         human_pairs=40 if agreement else 0,
                         human_low=agreement and agreement[name] - 0.15,
                         human_high=agreement and agreement[name] + 0.05,
                         human_agreement=agreement and agreement[name])
               for name in ("init-sft", "floored")]
    return {"rows": rows, "best_of_n": curve, "reward_models": records, "golden": "",
            "settings": {"demos": None}, "summary": summarise(rows, 16)}


GOLDEN = {"pi_SFT": 1.0, "demonstrations": 2.0, "best of 16, init-sft": 1.5,
          "best of 16, floored": 2.6, "best of 16, golden": 3.0}


@pytest.mark.parametrize("results, says", [
    (run_of(GOLDEN), "Of 2 reward models floored picks best: its best of 16 earns 2.60 ± 0.25 "
                     "points, 80% of what a selector that knows golden gains over pi_SFT. pi_SFT: "
                     "1.00, demonstrations: 2.00, that selector: 3.00."),
    (run_of(agreement={"init-sft": 0.66, "floored": 0.4}),
     "Nobody knows the golden reward of these data. Of 2 reward models init-sft agrees most with "
     "people, on 0.660 of 40 held-out pairs (95% interval 0.510 to 0.710), above chance."),
    (run_of(agreement={"init-sft": 0.3, "floored": 0.64}), "which chance may explain."),
    (run_of(), "no held-out pairs say what people prefer: read the samples."),
    ({**run_of(GOLDEN), "golden": "a model"}, "2.60 ± 0.25 log-odds by the trained model, 80%"),
    ({**run_of(), "reward_models": []}, "No reward model was asked for.")])
def test_the_verdict_is_what_came_out(results, says):
    """The first line that a reader sees: the wrong model or share there would be believed."""
    assert says in verdict(results)


# ---- the terminal -------------------------------------------------------------------------------

def test_the_printed_table_has_each_row_its_interval_and_the_outcome(capsys):
    """Names are written out, a line has at most 100 columns, and what is not known is a dash."""
    results = run_of(GOLDEN)
    results["rows"].append({**results["rows"][0], "golden": -1.25, "kl": 12.5, "reverse_kl": 7.0,
                            "name": "policy optimisation, preference 0.3"})
    print_table(results)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[3].split() == "golden proxy w/SFT w/demo KL rev fwd H len".split()
    cells = {line[:36].strip(): line[36:].split() for line in lines[4:]}
    assert cells["best of 16, floored"] == "2.60+-0.25 1.0 - - - - - - 20".split()
    assert cells["policy optimisation, preference 0.3"] == (
        "-1.25+-0.25 1.0 - - 12.5 7 - - 20".split())
    assert list(cells)[:6] == [row["name"] for row in results["rows"]]
    assert printed.endswith("best of 16 by init-sft: +0.50 points over pi_SFT, -0.50 over the "
                            "demonstrations,\n25% of what a selector that knows golden gains over "
                            "pi_SFT\n")
    print_table(run_of())
    assert "over pi_SFT" not in capsys.readouterr().out


def test_the_printed_table_of_several_seeds_has_their_mean_and_interval(capsys):
    """Over two seeds Student's t is 12.706: golden 1 and 3 give 2 +- 12.706."""
    results = run_of(GOLDEN)
    results["rows"] = [{**row, "seed": seed, "golden": 1.0 + 2 * seed}
                       for seed in range(2) for row in results["rows"]]
    results["summary"] = summarise(results["rows"], 16)
    print_table({**results, "golden": "reward model"})
    printed = capsys.readouterr().out
    assert printed.count("2.00+-12.71") == 5 and "in log-odds +- 95% over seeds" in printed
    assert "Golden is no truth here but a reward model, in log-odds" in printed


def test_the_printed_reward_models_show_agreement_where_people_were_asked(capsys):
    results = run_of(GOLDEN, {"init-sft": 0.65, "floored": 0.4}, marks=2.0)
    print_reward_models(results["reward_models"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == "init-sft 0.75 0.05 0.50 0.10 2.00 0.650 [0.500, 0.700]".split()
    print_reward_models(run_of()["reward_models"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == "floored 0.75 0.05 - 0.10 -".split()
    assert not any("people" in line for line in lines)


def test_the_printed_samples_hold_every_writer_and_word(capsys):
    """Also of a long prompt, whose end matters, and of an empty response."""
    response = {"text": "word " * 40, "golden": 1.0, "proxy": -2.25}
    samples = [{"prompt": "x" * 300 + "end", "writers": {"pi_0": {**response, "text": ""},
                                                         "best of 16, init-sft": response}}] * 5
    print_samples(samples)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100 and printed.count("word") == 3 * 40
    assert printed.count("best of 16, init-sft  +1.0 /  -2.2  word") == 3 and "xend'" in printed
    assert "pi_0                  +1.0 /  -2.2" in printed
    print_samples([{"prompt": "x", "writers": {"pi_0": {**response, "text": "a\x1b[2Jb\u202e"}}}])
    assert r"a\x1b[2Jb\u202e" in capsys.readouterr().out          # it would clear the screen


def test_the_proxies_of_length_and_chance_are_no_nats(capsys):
    """Length is in tokens, a coin in nothing; in a column of nats both stay empty."""
    results = run_of(GOLDEN)
    results["rows"] += [{**results["rows"][0], "name": f"best of 16, {name}", "proxy": 7.5}
                        for name in ("length", "random", "likelihood")]
    print_table(results)
    lines = capsys.readouterr().out.splitlines()
    shown = {name: "7.5" in next(line for line in lines if line.startswith(f"best of 16, {name}"))
             for name in ("length", "random", "likelihood")}
    assert shown == {"length": False, "random": False, "likelihood": True}


def test_seeds_are_collected_and_presented(capsys, tmp_path):
    """results.json holds the rows of all seeds, but not their samples; page and terminal show those
    of the first seed, and the paths of all that was written."""
    one = run_of(GOLDEN)
    content_of, samples = content(TAME, world_of(), TAME)
    head = {key: content_of[key] for key in ("command", "settings", "versions")}
    head["settings"]["n_candidates"] = 64
    parts = {str(seed): {
        "rows": [{**row, "seed": seed} for row in one["rows"]], "best_of_n": one["best_of_n"],
        "reward_models": one["reward_models"], "curves": {"spin": [seed]}, "samples": samples,
        "golden": f"model {seed}", "seconds": {"1 pi_0": 2.0}} for seed in (4, 5)}
    results = collect(tmp_path, head, parts)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(results))
    assert [row["seed"] for row in results["rows"]] == [4] * 5 + [5] * 5
    assert len(results["best_of_n"]) == 12 and len(results["reward_models"]) == 4
    assert results["golden"] == "model 4; model 5" and "samples" not in results
    assert results["curves"] == {"4": {"spin": [4]}, "5": {"spin": [5]}}
    assert results["summary"]["n"] == 16 and results["summary"]["seeds"] == [4, 5]
    (tmp_path / "seed4").mkdir()
    (tmp_path / "seed4" / "results.json").write_text(json.dumps({"samples": samples}), "utf-8")
    present(tmp_path, results, world_of())
    printed = capsys.readouterr().out
    assert "best of 16 by init-sft" in printed and "'tame 0'" in printed
    for name in ("best_of_n.png", "reward_models.png", "report.html"):
        assert str(tmp_path / name) in printed and (tmp_path / name).exists()


# ---- figures ------------------------------------------------------------------------------------

@pytest.mark.parametrize("results, panels", [
    (run_of(GOLDEN, marks=0.0), (2, 2)), (run_of(GOLDEN, marks=2.0), (2, 3)), (run_of(), (1, 1)),
    (run_of(agreement={"init-sft": 0.65, "floored": 0.4}), (1, 2))])
def test_no_panel_of_a_figure_is_empty(results, panels, tmp_path, monkeypatch):
    """Golden without a golden reward, the worth of marks without marks: room for nothing."""
    drawn = []
    monkeypatch.setattr(pyplot(), "close", lambda figure: drawn.append(figure))
    paths = draw_run(tmp_path, results)
    assert [path.name for path in paths] == list(FIGURES)
    assert tuple(len(figure.axes) for figure in drawn) == panels
    assert all(axis.lines[1:] or axis.patches for figure in drawn for axis in figure.axes)


@pytest.mark.parametrize("demos, golden, title", [
    (None, "", "golden reward (the truth), points"),
    ("mine.jsonl", "", "golden reward (by --gold), points"),
    ("mine.jsonl", "a model", "golden reward (a trained model's), log-odds")])
def test_only_a_built_in_task_s_golden_reward_is_called_the_truth(demos, golden, title, tmp_path,
                                                                  monkeypatch):
    drawn = []
    monkeypatch.setattr(pyplot(), "close", lambda figure: drawn.append(figure))
    draw_run(tmp_path, {**run_of(GOLDEN), "settings": {"demos": demos}, "golden": golden})
    assert drawn[0].axes[0].get_title() == title


def test_notes_and_people_s_agreement_are_shown(tmp_path):
    """What was cut or left out, as text; and agreement never without its interval."""
    world = world_of()
    world.notes = ["3 records left out: <b>"]
    results, samples = content(TAME, world, TAME, "mine.jsonl")
    results["reward_models"][0] |= {"human_agreement": 0.625, "human_low": 0.5,
                                    "human_high": 0.6875, "human_pairs": 60}
    page = written(tmp_path, results, samples, world)
    assert "<p>3 records left out: &lt;b&gt;</p>" in page
    assert Reader(page).tables["learned-title"][1][-1] == "0.625 [0.500, 0.688]"
    assert "on 0.625 of 60 held-out pairs (95% interval 0.500 to 0.688), which chance" in (
        Reader(page).texts["verdict"])


@pytest.mark.parametrize("name", ["helpful", "harmless"])
def test_highlighted_clauses_are_those_that_golden_adds_up(name):
    """Each clause under its kind, the marks apart, no letter lost; else the colours would lie."""
    task, rng = TextTask(name, heterogeneity=1.0), random.Random(1)
    world = world_of(task)
    odd = ["", ".", " . ", "~", "so . ~", "~ ~ so", ". . a", "a\n b .", "♪ ."]
    seen = set()
    for prompt in rng.sample(sorted(task.prompts), 60):
        for text in [*odd, task.demonstrate(prompt, rng), task.sample(prompt, rng)]:
            pieces = clauses(world, prompt, text)
            assert "".join(piece for _, piece in pieces) == text
            marks = [piece for kind, piece in pieces if kind == "mark"]
            assert marks == [word for word in text.split() if word in MARKS]
            plain = task.unmark(text)           # no mark parts a clause in two
            bare = [(kind, piece) for kind, piece in clauses(world, prompt, plain) if kind]
            kinds = [kind for kind, *_ in task.parse(prompt, text)]
            assert [(kind, piece.rstrip(".").strip()) for kind, piece in bare] == list(
                zip(kinds, map(str.strip, plain.split("."))))
            values = task.values(prompt)
            assert sum(values[kind] for kind in kinds) == task.golden(prompt, text)
            unmarked = [kind for kind, _ in pieces if kind not in (None, "mark")]
            assert list(dict.fromkeys(unmarked)) == list(dict.fromkeys(kinds))
            seen.update(kinds)
    assert {"step", "stray", "rude", "filler", "broken"} <= seen


def luminance(color):
    digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
    channels = [int(digits[k:k + 2], 16) / 255 for k in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear))


def test_colours_can_be_read(tmp_path):
    """WCAG AA asks for a contrast of 4.5 between text and what is behind it, light and dark."""
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", rule)) for rule in
                   re.findall(r":root \{(.*?)\}", own(tmp_path, TAME), re.S))
    assert set(light) == set(dark) >= {"ink", "page", "step", "repeat"}
    for scheme in (light, dark):
        for back in set(scheme) - {"ink", "soft", "link", "line"}:
            for front in ("ink", "soft", "link") if back in ("page", "head") else ("ink",):
                a, b = sorted((luminance(scheme[front]), luminance(scheme[back])))
                assert (b + 0.05) / (a + 0.05) >= 4.5, (front, back)


# ---- in a browser -------------------------------------------------------------------------------

@pytest.fixture
def browse(tmp_path):
    """browse(page, script): the page's DOM, read, after this script has run at its end."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")

    def dump(page, script=""):
        path = tmp_path / "page.html"
        path.write_text(page.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
        got = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--disable-extensions", "--allow-file-access-from-files",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000",
             "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=60)
        return Reader(got.stdout)
    return dump


PRESS = """for (const key of %s)
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));"""


def test_keys_turn_the_pages_and_every_pick_is_the_argmax(browse, tmp_path):
    """j j k: the second prompt; n n n from N = 8: 1, 2, 4, of which each selector's first best."""
    task = TextTask("helpful", heterogeneity=1.0)
    prompts, rng = sorted(task.prompts)[5:13], random.Random(2)
    texts = [task.demonstrate(x, rng) for x in prompts]
    results, samples = content(prompts, world_of(task), texts)
    page = written(tmp_path / "r", results, samples, world_of(task))
    for keys, at, n in ((["j", "ArrowRight", "k", "n", "n", "n"], 1, 4), (["ArrowLeft", "N"], 7, 4),
                        ([], 0, 8)):
        dom = browse(page, PRESS % json.dumps(keys))
        assert dom.texts["prompt"].startswith(prompts[at])
        candidates = samples[at]["candidates"]
        picks = {name: int(np.argmax(s[:n])) for name, s in candidates["scores"].items()}
        titles, *rows = dom.tables["picks"]
        assert titles == ["selector", "score", "golden, points", "no.", f"its best of {n}"]
        assert [(row[0], row[3], row[4]) for row in rows] == [
            (name, str(i + 1), candidates["text"][i]) for name, i in picks.items()]
        assert [float(row[2]) for row in rows] == [
            task.golden(prompts[at], candidates["text"][i]) for i in picks.values()]
        titles, *rows = dom.tables["candidates"]
        assert [row[3] for row in rows] == candidates["text"][:n]
        assert [float(row[titles.index("log-ratio")]) for row in rows] == (
            candidates["scores"]["log-ratio"][:n])
        assert [row[0] for row in dom.tables["writers"][1:]] == [
            "pi_0", "pi_SFT", "policy optimisation, init-sft 0.3", "demonstration"]
        assert "step +1 a step of the topic" in dom.texts["legend"]
        assert "mark the demonstrator's mark" in dom.texts["legend"]
        kinds = {kind for text, x in zip(texts, prompts) for kind, *_ in task.parse(x, text)}
        assert ("a kind refusal" in dom.texts["legend"]) == ("refusal" in kinds)


def test_markup_is_shown_as_text(browse, tmp_path):
    """Also in a world of one's own files, of which nobody knows a golden reward or kinds."""
    dom = browse(own(tmp_path / "r", NASTY), PRESS % '["j"]')
    assert [row[2] for row in dom.tables["candidates"][1:]] == NASTY[1:] + NASTY[:1]
    assert dom.texts["prompt"].startswith(NASTY[1])
    assert "mark" not in dom.tags and "img" not in dom.tags and dom.tags.count("h1") == 1
    assert "".join(dom.texts[None]).strip().startswith("nanoAfD: mine.jsonl; seed 0")


def test_a_small_screen_does_not_scroll_sideways(browse, tmp_path):
    """At 360 pixels: the page is in a frame, as a browser's window may not be so narrow."""
    task = TextTask("harmless")
    prompts = sorted(task.prompts)[:8]
    texts = [task.demonstrate(x, random.Random(0)) for x in prompts]
    pages = {"own": own(tmp_path / "own", NASTY, demos="d" * 200), "task": written(
        tmp_path / "task", *content(prompts, world_of(task), texts), world_of(task))}
    say = "<script>const page = document.documentElement;" + PRESS % '["k"]' + (
        "requestAnimationFrame(() => setTimeout(() => parent.postMessage(`${innerWidth} "
        "${page.scrollWidth - page.clientWidth} `"
        " + getComputedStyle(document.querySelector('.scroll'), '::before').content, '*')))"
        "</script></body>")
    for name, page in pages.items():
        (tmp_path / f"{name}.html").write_text(page.replace("</body>", say), "utf-8")
        dom = browse(f'<body><p id="got"></p><iframe src="{name}.html" width="360" height="800" '
                     'style="border:0"></iframe></body>', "onmessage = event => "
                     "document.getElementById('got').textContent = event.data;")
        assert dom.texts["got"].split()[:2] == ["360", "0"], name
        assert "more to the right" in dom.texts["got"], "no hint that the table is wider"
