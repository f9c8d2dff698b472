"""report.html: one page of a run that opens offline, to look at and to hand on.

report.html beside this file is its template. Tables, figures and settings are set in here; the
browser of samples is a script over one JSON text in the page. Text from data is never read as
markup: it is escaped in tables and in the JSON, and the script sets it as text only.
"""

import base64
import html
import json
import re
from itertools import groupby
from pathlib import Path

from model import write_aside
from toy_envs.figures import COLORS, by_writer, interval, number, over_seeds
from toy_envs.truth import WRITERS, name_of

TEMPLATE = Path(__file__).with_suffix(".html")
FIGURES = {     # that a run may have drawn: what is to be seen in them
    "best_of_n.png": "Best-of-N for each reward model: golden reward, and the rise of the proxy, "
                     "against N. Over-optimisation: the proxy goes on rising, golden falls.",
    "reward_models.png": "What each reward model learned: rank correlation with golden reward and "
                         "with length, and what the demonstrator's marks are worth to it.",
}
COLUMNS = (("proxy_mean", "proxy, nats", "{:.1f}"), ("win_vs_sft", "win/SFT", "{:.2f}"),
           ("win_vs_demo", "win/demo", "{:.2f}"), ("kl_from_sft", "KL, nats", "{:.1f}"),
           ("reverse_kl", "rev. KL, nats", "{:.1f}"), ("forward_kl", "fwd. KL, nats", "{:.1f}"),
           ("entropy", "entropy, nats", "{:.1f}"), ("distinct", "distinct", "{:.2f}"),
           ("length_mean", "length, tokens", "{:.0f}"))
LEARNED = (("accuracy", "accuracy"), ("calibration_error", "calibration error"),
           ("corr_golden", "correlation with golden"), ("corr_length", "correlation with length"),
           ("marks_worth", "worth of the marks, sd"))
PEOPLE = ("human_agreement", "agrees with people")


def write_report(out, results, samples, world):
    """Write out/report.html from results.json's content, pick_samples' and the world that they are
    of; returns its path."""
    config, rows = results["config"], results["rows"]
    n = min(16, config["n_candidates"])
    task = config["demos"] or f"{config['task']}, heterogeneity {config['heterogeneity']:g}"
    seeds = list(results["seconds"])
    over = "prompts" if len(seeds) == 1 else "seeds"
    settings = {"command": results["command"], "device": results["device"],
                **results["versions"], **config}
    parts = {
        "TITLE": html.escape(f"{task}; " + (f"seed {seeds[0]}" if over == "prompts" else
                                            f"seeds {seeds[0]} to {seeds[-1]}")),
        "OVER": over, "N": str(n), "SEED": seeds[0],
        "TABLE": result_table(rows, n), "LEARNED": learned_table(results["reward_models"]),
        "FIGURES": "\n".join(figure(Path(out) / name, caption)
                             for name, caption in FIGURES.items() if (Path(out) / name).exists()),
        "SETTINGS": "\n".join(f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(shown(value))}"
                              "</dd></div>" for key, value in settings.items()),
        "DATA": embed(browser_data(samples, world, rows, n)),
    }
    page = re.sub("<!-- ([A-Z]+) -->", lambda match: parts[match[1]],    # in one pass: no text from
                  TEMPLATE.read_text(encoding="utf-8"))                  # data is taken for a slot
    path = Path(out) / "report.html"
    write_aside(path, lambda part: part.write_text(page, encoding="utf-8"))
    return path


def embed(data):
    """data as JSON that may stand in a script element: no `<` in it, and ASCII only, so neither a
    tag's end nor U+2028."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def shown(value):
    """A setting as it would be typed."""
    if isinstance(value, list):
        return ",".join(map(shown, value)) or "none"
    return "–" if value in (None, "") else str(value)


def figure(path, caption):
    image = base64.b64encode(path.read_bytes()).decode()
    return (f'<figure><img src="data:image/png;base64,{image}" alt="{html.escape(caption)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def table(caption, header, rows):
    """A table in its own scroll box; rows: (colour of its reward model or None, name, *cells)."""
    head = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in header)
    body = "".join(
        "<tr><th scope=\"row\">"
        + (f'<i class="swatch" style="background:{color}"></i>' if color else "")
        + html.escape(name) + "</th>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells)
        + "</tr>\n" for color, name, *cells in rows)
    return (f'<div class="scroll" role="region" aria-label="{html.escape(caption)}" tabindex="0">'
            f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>\n"
            f"<tbody>{body}</tbody></table></div>")


def result_table(rows, n):
    """Golden reward beside every proxy: the table that a run prints."""
    lines = []
    for (method, name), mine in by_writer(rows, n).items():
        gold = number(over_seeds(mine, "gold_mean"))
        half = number(interval(mine, "gold_mean", "gold_ci95"))
        label = f"best of {n}, {name}" if method == "bon" else WRITERS.get(method, name)
        lines.append((COLORS.get(mine[0]["reward_model"]), label,
                      gold if "-" in (gold, half) else f"{gold} ± {half}",
                      *(number(over_seeds(mine, key), form) for key, _, form in COLUMNS)))
    return table("Golden reward beside every proxy",
                 ("writer", "golden, points", *(title for _, title, _ in COLUMNS)), lines)


def learned_table(records):
    """What the reward models learned, means over seeds."""
    columns = (*LEARNED, PEOPLE) if any(r["human_pairs"] for r in records) else LEARNED
    groups = {}
    for record in records:
        groups.setdefault(record["reward_model"], []).append(record)
    return table("What the reward models learned",
                 ("reward model", *(title for _, title in columns)),
                 [(COLORS[name], name, *(number(over_seeds(mine, key)) for key, _ in columns))
                  for name, mine in groups.items()])


# ---- the browser of samples ----------------------------------------------------------------------

def clauses(world, prompt, text):
    """[kind, piece] pairs whose pieces join to the response: clauses by their kind, and the
    demonstrator's marks as "mark"; one piece of kind None in a world that knows no kinds."""
    if not world.parse:
        return [[None, text]]
    kinds, pieces = iter([kind for kind, *_ in world.parse(prompt, text)]), []
    for clause in re.findall(r"\s+|[^\s.][^.]*\.?|\.", text):
        kind = next(kinds, None) if clause.strip() else None    # no kind: marks after the last one
        words = [(kind if world.unmark(word) or not word.strip() else "mark", word)
                 for word in re.findall(r"\s+|\S+\s*", clause)]
        pieces += [[kind, "".join(word for _, word in group)]
                   for kind, group in groupby(words, key=lambda pair: pair[0])]
    return pieces


def browser_data(samples, world, rows, n):
    """What the page's script reads: per prompt the writers' samples, the candidates' clauses and
    their scores by every selector, and the points of a clause by kind."""
    optimised = next((name_of(r) for r in rows if r["method"] == "po"), "")
    names = {"pi_0": "pi_0", "pi_SFT": "pi_SFT", "optimised": f"optimised policy: {optimised}",
             "demonstration": "demonstration"}
    prompts = []
    for sample in samples:
        if "candidates" in sample:
            x = sample["prompt"]
            prompts.append({
                "prompt": x.strip(), "points": world.values(x) if world.values else {},
                "writers": [{"name": title, "golden": sample["writers"][name]["golden"],
                             "said": clauses(world, x, sample["writers"][name]["text"])}
                            for name, title in names.items() if name in sample["writers"]],
                "said": [clauses(world, x, text) for text in sample["candidates"]["text"]],
                "scores": sample["candidates"]["scores"]})
    return {"n": n, "colors": COLORS, "prompts": prompts}
