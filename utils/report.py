"""A run's results for people: tables for the terminal, and report.html.

The page is complete in itself, to look at offline and to hand on. Its template beside this file has
slots for tables, figures and settings, and a script that browses samples from a JSON text. Text
from data is never markup: it is escaped here, and set as text there.
"""

import base64
import json
import re
import textwrap
from html import escape
from itertools import groupby
from pathlib import Path

from utils.cli import load_json, plural, printable, write_aside, write_json
from utils.evaluate import grouped, over_seeds, summarise
from utils.plots import COLORS, draw_run

FIGURES = {     # that a run may have drawn: what is to be seen in them
    "best_of_n.png": "Each proxy against N and, where it is known, the golden reward of its picks. "
                     "Where they part: over-optimisation.",
    "reward_models.png": "What the scores of each reward model go with; rank correlations are "
                         "within a prompt."}
# Columns of results.json: title, width and format in the terminal, where one without a title is
# not shown; title and format in the page.
RESULTS = (("golden", "golden", 11, ".2f", "golden, points", ".2f"),
           ("proxy", "proxy", 6, ".1f", "proxy, nats", ".1f"),
           ("win_vs_sft", "w/SFT", 6, ".2f", "win/SFT", ".2f"),
           ("win_vs_demo", "w/demo", 7, ".2f", "win/demo", ".2f"),
           ("kl", "KL", 6, ".1f", "KL, nats", ".1f"),
           ("reverse_kl", "rev", 5, ".0f", "rev. KL, nats", ".1f"),
           ("forward_kl", "fwd", 6, ".1f", "fwd. KL, nats", ".1f"),
           ("entropy", "H", 6, ".1f", "entropy, nats", ".1f"),
           ("distinct", "", 0, ".2f", "distinct", ".2f"),
           ("length", "len", 4, ".0f", "length, tokens", ".0f"))
LEARNED = (("accuracy", "accuracy", 9, ".2f", "accuracy", ".2f"),
           ("calibration_error", "calib.", 8, ".2f", "calibration error", ".2f"),
           ("corr_golden", "golden", 8, ".2f", "correlation with golden", ".2f"),
           ("corr_length", "length", 8, ".2f", "correlation with length", ".2f"),
           ("marks_worth", "marks", 8, ".2f", "worth of the marks, sd", ".2f"),
           ("human_agreement", "agrees with people", 24, ".3f", "agrees with people", ".3f"))


def number(value, form=".2f"):
    """The value in this format; a dash for one that is not known."""
    return "-" if value is None or value != value else format(value, form)


def cell(records, column, form, plus_minus):
    """The mean over seeds of a column; golden reward and agreement never without an interval."""
    mean, low, high = over_seeds(records, column)
    if column == "proxy" and records[0]["name"].endswith((", length", ", random")):
        mean = None         # what these two select by is in tokens or in nothing, not in nats
    text = number(mean, form)
    if column == "golden":
        half = None if mean is None else (high - low) / 2
        return f"{text}{plus_minus}{number(half, form):>4}"
    if column == "human_agreement" and mean is not None:    # it is not in the middle: both ends
        return f"{text} [{number(low, form)}, {number(high, form)}]"
    return text


def golden_note(note):
    """What a reader has to know where golden is a trained model, note its description."""
    return (f"Golden is no truth here but a {note}, in log-odds of being preferred instead of "
            "points. It starts from pi_0, as the rewards do that it evaluates: what pi_0 cannot "
            "tell apart, all of them may miss.")


# ---- all seeds together -------------------------------------------------------------------------

def collect(out, head, parts):
    """Write out/results.json: head, a run's provenance, and parts {seed: what afd.run returned},
    but for the samples, which stay in the files of the seeds. Returns what was written."""
    results = {**head, "golden": "; ".join(part["golden"] for part in parts.values()
                                           if part["golden"])}
    for key in ("rows", "best_of_n", "reward_models"):
        results[key] = [record for part in parts.values() for record in part[key]]
    for key in ("curves", "seconds"):
        results[key] = {seed: part[key] for seed, part in parts.items()}
    results["summary"] = summarise(results["rows"], min(16, head["settings"]["n_candidates"]))
    write_json(Path(out) / "results.json", results)
    return results


def present(out, results, world):
    """Draw the figures and write the report; print the tables and samples of the first seed."""
    first = next(iter(results["seconds"]))
    samples = load_json(Path(out) / f"seed{first}" / "results.json")["samples"]
    try:
        figures = [f"figure  {path}" for path in draw_run(out, results)]
    except ImportError as error:        # the numbers are safe; only the pictures need the extra
        figures = [str(error)]
    report = write_report(out, results, samples, world)
    print_table(results)
    print_reward_models(results["reward_models"])
    print_samples(samples)
    print(*figures, f"report  {report}", sep="\n")


# ---- the terminal -------------------------------------------------------------------------------

def print_table(results):
    """The final table, means over seeds: golden reward beside every proxy; then whether best-of-n
    by the first reward model worked."""
    groups = grouped(results["rows"], "name")
    over = "seeds" if len(results["summary"]["seeds"]) > 1 else "prompts"
    if results["golden"]:
        print("\n" + textwrap.fill(golden_note(results["golden"]), 78, break_long_words=False))
    unit = "log-odds" if results["golden"] else "points"
    print(f"\ngolden reward in {unit} +- 95% over {over}; in nats: proxies, KL(pi|SFT),\n"
          "rev KL(pi|demonstrator), fwd KL(demonstrator|pi), H entropy")
    print_lines(groups, RESULTS, max(map(len, groups)) + 1, "+-")
    print_outcome(results, unit)


def print_lines(groups, columns, margin, plus_minus):
    """Titles, then a line for each group of records: its name in the margin, its cells."""
    columns = [column for column in columns if column[1]]
    print(" " * margin + "".join(f"{title:>{width}}" for _, title, width, *_ in columns))
    for name, records in groups.items():
        print(f"{name:{margin}}" + "".join(f"{cell(records, column, form, plus_minus):>{width}}"
                                           for column, _, width, form, *_ in columns))


def print_outcome(results, unit):
    """Whether best-of-n by the first reward model beats pi_SFT and the demonstrations."""
    n, methods = results["summary"]["n"], results["summary"]["methods"]
    names = [record["reward_model"] for record in results["reward_models"]]
    if not names or f"best of {n}, {names[0]}" not in methods:
        return
    best = methods[f"best of {n}, {names[0]}"]
    over_sft, over_demo = (best["golden"][0] - methods[name]["golden"][0]
                           for name in ("pi_SFT", "demonstrations"))
    print(f"\nbest of {n} by {names[0]}: {over_sft:+.2f} {unit} over pi_SFT, {over_demo:+.2f} over "
          f"the demonstrations,\n{number(best['share_of_golden_gain'][0], '.0%')} of what a "
          "selector that knows golden gains over pi_SFT")


def print_reward_models(records):
    """What each reward model learned, means over seeds."""
    print("\nwhat the reward models learned: accuracy and calibration error on held-out pairs; rank"
          "\ncorrelation with golden reward and length; worth of the marks in sd of scores")
    people = any(record["human_pairs"] for record in records)
    groups = {f"  {name}": mine for name, mine in grouped(records, "reward_model").items()}
    print_lines(groups, LEARNED if people else LEARNED[:-1], 18, " +- ")


def print_samples(samples, count=3):
    """The first samples of evaluate.pick_samples, side by side."""
    print("\nsamples side by side: golden / the first reward model's score")
    for sample in samples[:count]:
        prompt = sample["prompt"].strip()
        prompt = prompt if len(prompt) < 200 else "..." + prompt[-200:]
        print("\n" + textwrap.fill(repr(prompt), 98, initial_indent="  ", subsequent_indent="    "))
        width = max(map(len, sample["writers"]))
        for name, response in sample["writers"].items():
            golden, proxy = number(response["golden"], "+.1f"), number(response["proxy"], "+.1f")
            head = f"    {name:{width}}{golden:>6} / {proxy:>5}  "
            text = printable(" ".join(response["text"].split()))
            print(textwrap.fill(text, 98, initial_indent=head,
                                subsequent_indent=" " * len(head)) or head.rstrip())
    print()


# ---- the page -----------------------------------------------------------------------------------

def write_report(out, results, samples, world):
    """Write out/report.html from what results.json holds, the samples of evaluate.pick_samples and
    their world (of any seed: only its kinds of clauses are read); returns its path."""
    path, settings = Path(out) / "report.html", results["settings"]
    seeds = [str(seed) for seed in results["seconds"]]
    n, over = results["summary"]["n"], "seeds" if len(seeds) > 1 else "prompts"
    task = f"{settings['task']}, heterogeneity {settings['heterogeneity'] or 0:g}"
    if settings["demos"]:
        task = Path(settings["demos"]).name
    # A column of zeros, as of the marks where there are none, is left out as well.
    learned = [part for part in LEARNED
               if any(record[part[0]] for record in results["reward_models"])]
    shown = {"command": results["command"], **results["versions"], **settings}
    data = json.dumps(browser_data(samples, world, n), allow_nan=False)
    parts = {
        "TITLE": escape(f"{task}; seed {' to '.join(dict.fromkeys((seeds[0], seeds[-1])))}"),
        "GOLDEN": f"Golden reward per response ± 95% over {over}; no method sees it, except "
                  "through preference labels." if results["summary"]["methods"] else "",
        "N": str(n), "SEED": seeds[0], "VERDICT": escape(verdict(results)),
        "NOTES": "".join(f"<p>{escape(note)}</p>\n" for note in world.notes),
        "GOLD": escape(golden_note(results["golden"])) if results["golden"] else "",
        "TABLE": page_table("Golden reward beside every proxy", "writer",
                            grouped(results["rows"], "name"), RESULTS),
        "LEARNED": page_table("What the reward models learned", "reward model",
                              grouped(results["reward_models"], "reward_model"), learned),
        "FIGURES": "".join(figure(path.with_name(name), caption)
                           for name, caption in FIGURES.items() if path.with_name(name).exists()),
        "SETTINGS": "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>\n"
                            for key, value in shown.items() if value is not None),
        "DATA": data.replace("<", "\\u003c")}       # no tag can end or begin in the script element
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = re.sub("<!-- ([A-Z]+) -->", lambda slot: parts[slot[1]], template)
    write_aside(path, lambda part: part.write_text(page, encoding="utf-8"))
    return path


def verdict(results):
    """What came out, in a sentence or two: the reward model whose picks of n earn most golden
    reward, or that agrees most with people, or that nobody knows."""
    learned = grouped(results["reward_models"], "reward_model")
    methods, n = results["summary"]["methods"], results["summary"]["n"]
    if not learned:
        return "No reward model was asked for."
    among = f"Of {plural(len(learned), 'reward models')} "
    if methods:
        golden = {name: method["golden"][0] for name, method in methods.items()}
        models = [name for name in learned if f"best of {n}, {name}" in methods]
        best = max(models, key=lambda name: golden[f"best of {n}, {name}"])
        name = f"best of {n}, {best}"
        _, low, high = over_seeds(grouped(results["rows"], "name")[name], "golden")
        unit = "log-odds by the trained model" if results["golden"] else "points"
        share = number(methods[name]["share_of_golden_gain"][0], ".0%")
        return (f"{among}{best} picks best: its best of {n} earns {golden[name]:.2f} ± "
                f"{number((high - low) / 2)} {unit}, {share} of what a selector that knows golden "
                f"gains over pi_SFT. pi_SFT: {golden['pi_SFT']:.2f}, demonstrations: "
                f"{golden['demonstrations']:.2f}, that selector: "
                f"{golden[f'best of {n}, golden']:.2f}.")
    unknown = "Nobody knows the golden reward of these data"
    if not any(record["human_pairs"] for record in results["reward_models"]):
        return f"{unknown}, and no held-out pairs say what people prefer: read the samples."
    best = max(learned, key=lambda name: over_seeds(learned[name], "human_agreement")[0])
    mean, low, high = over_seeds(learned[best], "human_agreement")
    chance = "above chance" if low > 0.5 else "which chance may explain"
    pairs = plural(learned[best][0]["human_pairs"], "held-out pairs")
    return (f"{unknown}. {among}{best} agrees most with people, on {mean:.3f} of {pairs} (95% "
            f"interval {low:.3f} to {high:.3f}), {chance}.")


def figure(path, caption):
    """A picture embedded in the page, in a scroll box."""
    image, text = base64.b64encode(path.read_bytes()).decode(), escape(caption)
    return (f'<figure><div class="scroll" role="region" aria-label="{path.stem}" tabindex="0">'
            f'<img src="data:image/png;base64,{image}" alt="{text}"></div>'
            f"<figcaption>{text}</figcaption></figure>\n")


def page_table(caption, corner, groups, columns):
    """A table in a scroll box: a line for each group of records, without the columns of which
    nothing is known. corner: the title of the names."""
    shown = {}
    for column, *_, title, form in columns:
        # A single prompt has no interval: then the mean stands alone.
        cells = [cell(records, column, form, " ± ").removesuffix(" ±    -")
                 for records in groups.values()]
        if set(cells) != {"-"}:
            shown[title] = cells
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in (corner, *shown))
    body = ""
    for name, *cells in zip(groups, *shown.values()):
        # "best of 16, init-sft" and "policy optimisation, init-sft 0.3" have init-sft's colour.
        subject = name.split(", ")[-1]
        color = COLORS.get(subject, COLORS.get(subject.split(" ")[0]))
        swatch = f'<i class="swatch" style="background:{color}"></i>' if color else ""
        body += (f'<tr><th scope="row">{swatch}{escape(name)}</th>'
                 + "".join(f"<td>{escape(text)}</td>" for text in cells) + "</tr>\n")
    return (f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table>'
            f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>")


# ---- the browser of samples ---------------------------------------------------------------------

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


def browser_data(samples, world, n):
    """What the page's script reads: pick_samples' samples in clauses, with the points of each. The
    selectors' picks are left out, since the script finds them itself, for every n."""
    prompts = []
    for sample in samples:
        if "candidates" not in sample:
            continue
        x = sample["prompt"]
        prompts.append({
            "prompt": x.strip(), "points": world.values(x) if world.values else {},
            "writers": [{"name": name, "golden": response["golden"],
                         "response": clauses(world, x, response["text"])}
                        for name, response in sample["writers"].items()
                        if not name.startswith("best of")],
            "candidates": [clauses(world, x, text) for text in sample["candidates"]["text"]],
            "scores": sample["candidates"]["scores"]})
    return {"n": n, "colors": COLORS, "prompts": prompts}
