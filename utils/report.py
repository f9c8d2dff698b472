"""report.html: one page of a run, complete in itself, to look at offline and to hand on.

The template beside this file has slots for tables, figures and settings, and a script that browses
samples from a JSON text. Text from data is never markup: escaped here, and set as text there.
"""

import base64
import json
import re
from html import escape
from itertools import groupby
from pathlib import Path

from model import write_aside
from utils.plots import (COLORS, agreement, by_model, by_writer, interval, number,
                              over_seeds)
from utils.cli import counted
from utils.evaluate import WRITERS, judge_note, name_of

FIGURES = {     # that a run may have drawn: what is to be seen in them
    "best_of_n.png": "Each proxy against N and, where it is known, the golden reward of its picks. "
                     "Where they part: over-optimisation.",
    "reward_models.png": "What the scores of each reward model go with; rank correlations are "
                         "within a prompt."}
COLUMNS = (("proxy_mean", "proxy, nats", "{:.1f}"), ("win_vs_sft", "win/SFT", "{:.2f}"),
           ("win_vs_demo", "win/demo", "{:.2f}"), ("kl_from_sft", "KL, nats", "{:.1f}"),
           ("reverse_kl", "rev. KL, nats", "{:.1f}"), ("forward_kl", "fwd. KL, nats", "{:.1f}"),
           ("entropy", "entropy, nats", "{:.1f}"), ("distinct", "distinct", "{:.2f}"),
           ("length_mean", "length, tokens", "{:.0f}"))
LEARNED = (("accuracy", "accuracy"), ("calibration_error", "calibration error"),
           ("corr_golden", "correlation with golden"), ("corr_length", "correlation with length"),
           ("marks_worth", "worth of the marks, sd"), ("human_agreement", "agrees with people"))


def write_report(out, results, samples, world):
    """Write out/report.html from what results.json holds, the samples of truth.pick_samples and
    their world (of any seed: only its kinds of clauses are read); returns its path."""
    path, config, seeds = Path(out) / "report.html", results["config"], list(results["seconds"])
    n, over = min(16, config["n_candidates"]), "seeds" if len(seeds) > 1 else "prompts"
    task = (Path(config["demos"]).name if config["demos"] else
            f"{config['task']}, heterogeneity {config['heterogeneity']:g}")
    data = json.dumps(browser_data(samples, world, results["rows"], n), allow_nan=False)
    parts = {
        "TITLE": escape(f"{task}; seed {' to '.join(dict.fromkeys((seeds[0], seeds[-1])))}"),
        "GOLDEN": f"Golden reward per response ± 95% over {over}; no method sees it, except "
                  "through preference labels." if results["summary"] else "",
        "N": str(n), "SEED": seeds[0],
        "VERDICT": escape(verdict(results, n)),
        "NOTES": "".join(f"<p>{escape(note)}</p>\n" for note in world.notes),
        "GOLD": escape(judge_note(results["gold"])) if results.get("gold") else "",
        "TABLE": result_table(results["rows"], n),
        "LEARNED": learned_table(results["reward_models"]),
        "FIGURES": "".join(figure(path.with_name(name), caption)
                           for name, caption in FIGURES.items() if path.with_name(name).exists()),
        "SETTINGS": "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>\n"
                            for key, value in {"command": results["command"],
                                               **results["versions"], **config}.items()
                            if value is not None),
        "DATA": data.replace("<", "\\u003c")}       # no tag can end or begin in the script element
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = re.sub("<!-- ([A-Z]+) -->", lambda slot: parts[slot[1]], template)
    write_aside(path, lambda part: part.write_text(page, encoding="utf-8"))
    return path


def verdict(results, n):
    """What came out, in a sentence or two: the reward model whose picks of n earn most golden
    reward, or that agrees most with people, or that nobody knows."""
    learned, methods = by_model(results["reward_models"]), (results["summary"] or {}).get("methods")
    if not learned:
        return "No reward model was asked for."
    among = f"Of {counted(len(learned), 'reward models')} "
    if methods:
        best = max((name for name in learned if name in methods),
                   key=lambda name: methods[name]["gold"][0])
        half = interval(by_writer(results["rows"], n)["bon", best], "gold_mean", "gold_ci95")
        gold = {name: f"{method['gold'][0]:.2f}" for name, method in methods.items()}
        unit = "log-odds by the trained judge" if results["gold"] else "points"
        share = number(methods[best]["share_of_golden_gain"][0], "{:.0%}")
        return (f"{among}{best} picks best: its best of {n} earns {gold[best]} ± {number(half)} "
                f"{unit}, {share} of what a selector that knows golden gains over pi_SFT. "
                f"pi_SFT: {gold['sft']}, demonstrations: {gold['demo']}, that selector: "
                f"{gold['golden']}.")
    said = "Nobody knows the golden reward of these data"
    if not any(r["human_pairs"] for r in results["reward_models"]):
        return f"{said}, and no held-out pairs say what people prefer: read the samples."
    best = max(learned, key=lambda name: over_seeds(learned[name], "human_agreement"))
    mean, half = agreement(learned[best])
    chance = "above chance" if mean - half > 0.5 else "which chance may explain"
    return (f"{said}. {among}{best} agrees most with people, on {mean:.3f} ± {half:.3f} of "
            f"{counted(learned[best][0]['human_pairs'], 'held-out pairs')}, {chance}.")


def figure(path, caption):
    """A picture embedded in the page, in a scroll box."""
    image, text = base64.b64encode(path.read_bytes()).decode(), escape(caption)
    return (f'<figure><div class="scroll" role="region" aria-label="{path.stem}" tabindex="0">'
            f'<img src="data:image/png;base64,{image}" alt="{text}"></div>'
            f"<figcaption>{text}</figcaption></figure>\n")


def table(caption, header, lines):
    """A table in a scroll box, without the columns of which nothing is known; the first cell of
    each line is (name, colour or None)."""
    header, *lines = zip(*(c for c in zip(header, *lines) if set(c[1:]) != {"-"}))
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in header)
    body = ""
    for (name, color), *cells in lines:
        swatch = f'<i class="swatch" style="background:{color}"></i>' if color else ""
        body += (f'<tr><th scope="row">{swatch}{escape(name)}</th>'
                 + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n")
    return (f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table>'
            f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>")


def result_table(rows, n):
    """Golden reward beside every proxy: the table that a run prints."""
    lines = []
    for (method, name), mine in by_writer(rows, n).items():
        gold, half = over_seeds(mine, "gold_mean"), number(interval(mine, "gold_mean", "gold_ci95"))
        label = f"best of {n}, {name}" if method == "bon" else WRITERS.get(method, name)
        lines.append(((label, COLORS.get(mine[0]["reward_model"])),
                      number(gold) + (f" ± {half}" if half != "-" else ""),
                      *(number(over_seeds(mine, key), form) for key, _, form in COLUMNS)))
    return table("Golden reward beside every proxy",
                 ("writer", "golden, points", *(title for _, title, _ in COLUMNS)), lines)


def learned_table(records):
    """What the reward models learned: the second table that a run prints."""
    known, lines = [part for part in LEARNED if any(r[part[0]] for r in records)], []
    for name, mine in by_model(records).items():
        cells = {key: number(over_seeds(mine, key)) for key, _ in known}
        if "human_agreement" in cells:
            mean, half = agreement(mine)
            cells["human_agreement"] = f"{number(mean, '{:.3f}')} ± {number(half, '{:.3f}')}"
        lines.append(((name, COLORS[name]), *cells.values()))
    return table("What the reward models learned",
                 ("reward model", *(title for _, title in known)), lines)


# ---- the browser of samples ----------------------------------------------------------------------

def clauses(world, prompt, text):
    """[kind, piece] pairs whose pieces join to the response: clauses by their kind, between them
    the demonstrator's marks as "mark"; kind None where nobody knows it, and for white space."""
    if not world.parse:
        return [[None, text]]
    kinds, pieces = iter([kind for kind, *_ in world.parse(prompt, text)]), []
    for clause in re.findall(r"\s+|[^\s.][^.]*\.?|\.", text):
        kind = next(kinds, None) if clause.strip() else None    # none left: marks after the last
        words = [("mark" if word.strip() and not world.unmark(word) else kind, word)
                 for word in re.findall(r"\s+|\S+", clause)]
        pieces += [[key, "".join(word for _, word in group)]
                   for key, group in groupby(words, key=lambda pair: pair[0])]
    return pieces


def browser_data(samples, world, rows, n):
    """What the page's script reads: pick_samples' samples in clauses, with the points of each."""
    names = {"pi_0": "pi_0", "pi_SFT": "pi_SFT", "demonstration": "demonstration",
             "optimised": next((name_of(r) for r in rows if r["method"] == "po"), None)}
    prompts = [{
        "prompt": x.strip(), "points": world.values(x) if world.values else {},
        "writers": [{"name": names[name], "golden": said["golden"],
                     "said": clauses(world, x, said["text"])}
                    for name, said in sample["writers"].items() if name in names],
        "said": [clauses(world, x, text) for text in sample["candidates"]["text"]],
        "scores": sample["candidates"]["scores"],
    } for sample in samples if "candidates" in sample for x in [sample["prompt"]]]
    return {"n": n, "colors": COLORS, "prompts": prompts}
