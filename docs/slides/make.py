"""Make deck.html, the slides in one file, from deck.md.

    python docs/slides/make.py         draw the figures anew, then make the deck
    python docs/slides/make.py text    keep the figures: this needs nothing but Python

A line `---` ends a slide, `Notes, 3 minutes:` begins what the speaker alone sees, and `{GROUP
COLUMN: ROW}` is the mean over seeds of a row of docs/results.json, with its 95% interval.
"""

import base64
import json
import re
import sys
from html import escape
from pathlib import Path
from statistics import fmean, stdev

HERE = Path(__file__).resolve().parent
STUDENT_T = {2: 12.7062, 3: 4.3027, 4: 3.1824, 5: 2.7764}      # of the 95% interval, by seeds


def number(data, group, column, row):
    """"3.61 ± 0.10": mean and 95% half-width over seeds of a column of a row of results.json."""
    found = [r[column] for r in data["rows"] if r["group"] == group and r["name"] == row]
    if len(found) not in STUDENT_T:
        sys.exit(f"error: results.json has {len(found)} seeds of {{{group} {column}: {row}}}")
    half, digits = STUDENT_T[len(found)] * stdev(found) / len(found) ** 0.5, 1 + (column != "kl")
    return f"{fmean(found):.{digits}f} ± {half:.{digits}f}".replace("-", "−")


def inline(text, tag):
    """A line of Markdown as the content of an HTML element."""
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", escape(text.strip(), quote=False))
    return f"<{tag}>" + re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text) + f"</{tag}>"


def block(text):
    """The HTML of one block; an image stays one, so that names inside two figures cannot meet."""
    if text.startswith("```"):
        return f"<pre>{escape(text.strip('`').strip())}</pre>"
    if text.startswith("# "):
        return inline(text[2:], "h2")
    if image := re.fullmatch(r"!\[(.+)\]\((.+)\)", text, re.S):
        picture = base64.b64encode((HERE / image[2]).read_bytes()).decode()
        return f'<img alt="{escape(image[1])}" src="data:image/svg+xml;base64,{picture}">'
    if text.startswith("> "):
        return f"<blockquote>{render(re.sub('^> ?', '', text, flags=re.M))}</blockquote>"
    if text.startswith("|"):
        head, _, *rows = [line.strip("|").split("|") for line in text.splitlines()]
        lines = [[inline(x, "td" if row in rows else "th") for x in row] for row in (head, *rows)]
        return "<table>" + "".join(f"<tr>{''.join(line)}</tr>\n" for line in lines) + "</table>"
    if tag := {"- ": "ul", "1.": "ol"}.get(text[:2]):
        items = [inline(item, "li") for item in re.split(r"\n(?:- |\d\. )", "\n" + text)[1:]]
        return "\n".join([f"<{tag}>", *items, f"</{tag}>"])
    return inline(text, "p")


def render(text):
    """Markdown to HTML: an empty line ends a block, but a block of code."""
    parts = re.findall(r"(?s:```.+?```)|(?:.*\S.*\n?)+", text)
    return "\n".join(block(part.strip()) for part in parts)


def make(source, data):
    """The deck, HTML in one string, from Markdown and the content of results.json."""
    source = re.sub(r"{(\S+) (\S+): (.+?)}", lambda key: number(data, *key.groups()), source)
    sections, start, slides = [], 0, re.split(r"^---$", source, flags=re.M)
    for n, slide in enumerate(slides, 1):
        shown, *rest = re.split(r"^Notes, (\d+) minutes?:$", slide, flags=re.M)
        if len(rest) != 2:
            sys.exit(f'error: slide {n} of deck.md needs one line "Notes, 3 minutes:"')
        sections.append(f"""<section id="s{n}">
<div class="slide">\n{render(shown)}\n<footer>{n} / {len(slides)}</footer>\n</div>
<aside>\n<h3>Slide {n}: minute {start} to {start + int(rest[0])}</h3>\n{render(rest[1])}\n</aside>
</section>""")
        start += int(rest[0])
    page = (HERE / "template.html").read_text(encoding="utf-8")
    return page.replace("<!-- slides -->", "\n".join(sections))


def main():
    data = json.loads((HERE.parent / "results.json").read_text(encoding="utf-8"))
    if sys.argv[1:] != ["text"]:
        from figures import draw_all        # it needs matplotlib and torch, which words do not
        draw_all(data, HERE / "figures")
    (HERE / "deck.html").write_text(make((HERE / "deck.md").read_text("utf-8"), data), "utf-8")


if __name__ == "__main__":
    main()
