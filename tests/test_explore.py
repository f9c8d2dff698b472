"""docs/explore.html: what its script computes is what the Python modules compute, and what it shows
is what it computed. One start of headless Chromium, where there is one, does everything."""

import itertools
import json
import math
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import torch

from divergences import DIVERGENCES, TOTAL_VARIATION, f_divergence
from toy_envs import gaussian, heterogeneity
from toy_envs.text_tasks import BASE_KINDS, VALUES, TextTask
from utils.plots import COLORS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "explore.html").read_text(encoding="utf-8")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                                "google-chrome-stable"))), None)
LEFT = gaussian.Settings(starts=4, points=1500)
SETTINGS = {"start": gaussian.Settings(), "few points": LEFT,
            "far": gaussian.Settings(left=-3.0, right=3.0, weight=0.8, points=1500)}
THETAS = [[0.3, 0.4], [-1.5, -0.2], [2.0, 0.9]]         # mean and log std
NS = [1, 2, 3, 16, 64, 1024, 16384]
PLANES = [(1.5, 2.0, 0.0, 16), (2.0, 3.0, 0.5, 4), (0.5, 1.0, 1.0, 64), (1.0, 0.0, 0.0, 2)]
RHOS = [0.0, 0.3, 0.7, 0.95]
TILTS = [(base, tau) for base in ("good", "idle") for tau in (0.3, 1.0, 3.0)]

# What the page is asked, after its own script. Sliders are moved as a hand would: by their event.
ASK = """<script>
function move(values) {
  for (const [id, value] of Object.entries(values)) {
    $(id).value = value;
    $(id).dispatchEvent(new Event("input", {bubbles: true}));
  }
  return Object.fromEntries([...document.querySelectorAll("section")].map(section =>
    [section.querySelector("h2").id, {says: section.querySelector(".says").textContent,
      label: section.querySelector("svg[role=img]").getAttribute("aria-label"),
      rows: [...section.querySelectorAll("tbody tr")].map(row =>
        [...row.cells].map(cell => cell.textContent.trim()))}]));
}
const given = %s, got = {};
got.names = DIVERGENCES.map(d => d.name);
got.colors = Object.fromEntries([...DIVERGENCES, ...REWARDS].map(d => [d.name, d.color]));
got.kinds = [BASE_KINDS, VALUES];
const worlds = Object.entries(given.settings).map(([name, s]) => [name, s, demonstrator(s)]);
const kinked = d => d.reward ? d : rounded(0.03);
got.at = DIVERGENCES.map(d => given.thetas.map(theta =>
  [divergenceAt(d, worlds[1][2], theta).value,
    divergenceAt(kinked(d), worlds[1][2], theta).gradient]));
got.fits = Object.fromEntries(worlds.map(([name, s, world]) =>
  [name, DIVERGENCES.map(d => fit(d, world, s))]));
got.maximum = given.ns.map(expectedMaximum);
got.directions = given.planes.map(plane => directions(...plane).map(way => way.end));
got.heavy = given.rhos.map(rho => given.ns.map(heavyProxy(rho)));
got.normal = given.rhos.map(rho => given.ns.map(normalProxy(rho)));
got.turns = given.rhos.slice(1).map(rho => law("heavy", rho).reduce((a, b) =>
  b.golden > a.golden ? b : a).k);
got.tilted = given.tilts.map(([base, tau]) => tilted(Object.values(BASE_KINDS[base]), tau));
got.best = got.tilted.map((p, i) => selectors(p, given.tilts[i][1]).map(({score}) =>
  [1, 3, 16].map(n => bestOfN(p, score, n))));
got.shown = [move({}), move({divergence: 5, quality: 2, leak: 0.5, tail: "heavy"}),
  ($("idle").click(), move({"law-n": 14}))];
got.controls = [...document.querySelectorAll("input, select, button")].map(control =>
  [control.tagName, control.id, control.labels.length, control.tabIndex]);
const page = document.documentElement;
got.wide = [innerWidth, page.scrollWidth - page.clientWidth];
parent.postMessage(JSON.stringify(got), "*");
</script></body>"""


@pytest.fixture(scope="module")
def got(tmp_path_factory):
    """What the page answers to ASK. It is in a frame as wide as a phone."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    folder = tmp_path_factory.mktemp("explore")
    given = {"settings": {name: vars(s) for name, s in SETTINGS.items()}, "thetas": THETAS,
             "ns": NS, "planes": PLANES, "rhos": RHOS, "tilts": TILTS}
    asked = PAGE.replace("</body>", ASK % json.dumps(given))
    (folder / "page.html").write_text(asked, encoding="utf-8")
    (folder / "frame.html").write_text(
        '<p id="got"></p><iframe src="page.html" width="380" height="800" style="border:0">'
        "</iframe><script>onmessage = event => document.getElementById('got').textContent = "
        "event.data;</script>", encoding="utf-8")
    dom = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-extensions", "--allow-file-access-from-files",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
         (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=300).stdout
    answer = re.search(r'<p id="got">(.+?)</p>', dom, re.S)
    assert answer, "the page's script or the test's has stopped with an error"
    return json.loads(unescape(answer[1]))


def close(a, b, tolerance=1e-6):
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- one Normal on two modes --------------------------------------------------------------------

def objective(name, log_beta, log_pi):
    """What gaussian.solve minimises: D_f, with total variation's kink rounded."""
    divergence = DIVERGENCES[name]
    if divergence is TOTAL_VARIATION:
        return gaussian.rounded_total_variation(log_beta, log_pi, 0.03)
    return f_divergence(divergence, log_beta, log_pi)


def gradient_at(s, name, mean, log_std):
    """The Python module's D_f (float) and its objective's gradient in (mean, log std), (2,)."""
    x, log_beta = gaussian.demonstrator(s)
    theta = torch.tensor([mean, log_std], dtype=torch.float64, requires_grad=True)
    log_pi = gaussian.normal_log_prob(x, theta[:1], theta[1:].exp())[0]
    gradient, = torch.autograd.grad(objective(name, log_beta, log_pi), theta)
    return f_divergence(DIVERGENCES[name], log_beta, log_pi).item(), gradient


def test_divergences_and_gradients_are_those_of_the_module(got):
    """A failure means a wrong f or a wrong reward: the gradient is made of the reward, and autograd
    knows no reward."""
    assert sorted(got["names"]) == sorted(DIVERGENCES)
    for name, answers in zip(got["names"], got["at"]):
        for theta, (value, gradient) in zip(THETAS, answers):
            expected = gradient_at(LEFT, name, *theta)
            close(value, expected[0], 1e-9)
            close(gradient, expected[1], 1e-8)


def test_best_fits_are_those_of_the_module(got):
    """A failure means that the page fits something else, or ends in another optimum."""
    fits = gaussian.fit_all(LEFT, *gaussian.demonstrator(LEFT))
    for name, optima in zip(got["names"], got["fits"]["few points"]):
        expected = fits[name][0]
        for key in ("mean", "std", "value"):
            assert optima[0][key] == pytest.approx(expected[key], abs=1e-6), (name, key)


@pytest.mark.parametrize("world", SETTINGS)
def test_every_optimum_is_one_of_the_module_s_objective(world, got):
    """A failure means that a line on the page is no optimum. At the settings it opens with, too."""
    for name, optima in zip(got["names"], got["fits"][world]):
        assert optima == sorted(optima, key=lambda o: o["value"])
        for optimum in optima:
            value, gradient = gradient_at(SETTINGS[world], name, optimum["mean"],
                                          math.log(optimum["std"]))
            assert optimum["value"] == pytest.approx(value, abs=1e-6)
            assert gradient.norm() < 1e-6, (name, optimum)


def test_what_the_page_says_of_covering(got):
    """A failure means that a folded answer is wrong: who covers near, and who lets go far away."""
    near, far = ({name: optima[0]["std"] > 1.4 for name, optima in zip(got["names"], fits)}
                 for fits in (got["fits"]["start"], got["fits"]["far"]))
    assert [name for name in near if near[name]] == [
        "jensen_shannon", "squared_hellinger", "forward_kl", "pearson_chi2"]
    assert [name for name in far if far[name]] == ["forward_kl", "pearson_chi2"]


# ---- best-of-N ----------------------------------------------------------------------------------

def test_best_of_n_s_gain_and_directions_are_those_of_the_module(got):
    """A failure means that the arrows are too long, or point elsewhere than Fisher's direction."""
    close(got["maximum"], [heterogeneity.expected_maximum(n) for n in NS])
    for (quality, mark, leak, n), ends in zip(PLANES, got["directions"]):
        means = heterogeneity.cloud_means(quality, mark, leak)
        for (negative, positive, _), end in zip(heterogeneity.REWARDS.values(), ends):
            w = means[positive] - means[negative]
            if end is None:
                assert w.norm() == 0
            else:
                close(end, means["sft"] + heterogeneity.best_of_n_shift(w, n))


def test_a_proxy_with_normal_error_gains_rho_times_its_own_score(got):
    """A failure means that golden falls, or rises too far, where theory knows it exactly."""
    for rho, answers in zip(RHOS, got["normal"]):
        for n, answer in zip(NS, answers):
            close(answer["proxy"], heterogeneity.expected_maximum(n))
            close(answer["golden"], rho * heterogeneity.expected_maximum(n))


def test_a_heavy_tailed_proxy_by_other_formulas(got):
    """A failure means that the turn of golden is an artefact of the page's quadrature.

    Here F comes from the error's closed form, 1 - F_e(e) = [acot e - e / (1 + e^2)] / pi, and
    E[max] = int_0 (1 - F^n) - int^0 F^n. Golden is by Stein's lemma: rho E[g | p] = -rho^2 f'/f for
    a normal g, and so E[g of the best] = rho n (n - 1) int f^2 F^(n-2).
    """
    t = torch.arange(-2400, 2401, dtype=torch.float64) * 0.0075
    x, slope = t.sinh()[:, None], t.cosh()
    g = torch.linspace(-9, 9, 361, dtype=torch.float64)
    weight = (-g.square() / 2).exp() / math.sqrt(2 * math.pi) * (g[1] - g[0])
    for rho, answers in zip(RHOS, got["heavy"]):
        e = (x - rho * g) / math.sqrt(1 - rho ** 2)
        f = 2 / math.pi / (1 + e.square()).square() @ weight / math.sqrt(1 - rho ** 2)
        upper = (torch.atan2(torch.ones_like(e), e) - e / (1 + e.square())) / math.pi @ weight
        # By symmetry F(x) = 1 - F(-x), which keeps its digits in both tails.
        log_F = torch.where(t > 0, torch.log1p(-upper), upper.flip(0).clamp(min=1e-300).log())
        for n, answer in zip(NS, answers):
            tail = torch.where(t > 0, -torch.expm1(n * log_F), -(n * log_F).exp())
            tail[2400] += 0.5           # at 0 it jumps by 1: the trapezoid takes the middle
            close(answer["proxy"], torch.trapezoid(tail * slope, t))
            power = f.square() * ((n - 2) * log_F).exp()
            close(answer["golden"], rho * n * (n - 1) * torch.trapezoid(power * slope, t))


def test_golden_turns_with_a_heavy_tail_and_never_with_a_normal_one(got):
    """A failure means that a folded answer is wrong. The better the proxy, the later golden turns."""
    assert got["turns"] == sorted(set(got["turns"]))
    for rho, heavy, normal in list(zip(RHOS, got["heavy"], got["normal"]))[1:]:
        golden = [answer["golden"] for answer in heavy]
        peak = golden.index(max(golden))
        assert 0 < peak < len(NS) - 1 and golden == sorted(golden[:peak]) + sorted(
            golden[peak:], reverse=True)
        for answers, key in ((heavy, "proxy"), (normal, "proxy"), (normal, "golden")):
            values = [answer[key] for answer in answers]
            assert values == sorted(set(values))


# ---- reward or sharpening -----------------------------------------------------------------------

def test_the_four_kinds_are_those_of_the_world(got):
    """A failure means that page and module speak of different worlds."""
    bases, values = got["kinds"]
    assert bases == {base: BASE_KINDS[base]["helpful"] for base in BASE_KINDS}
    assert values == {kind: VALUES["benign"][kind] for kind in values}
    prompt = next(iter(TextTask().prompts))
    for (base, tau), p in zip(TILTS, got["tilted"]):
        kinds, _, _ = TextTask(base=base).tilted(prompt, tau)
        assert list(values) == list(kinds)
        close(p, list(kinds.values()), 1e-12)


def test_the_best_clause_of_n_by_enumeration(got):
    """A failure means wrong shares of kinds. All triples of clauses are listed; of equal scores
    each is taken equally often. And the claims: level on a good base, worse than chance on an idle
    one, unless the demonstrator is decided."""
    values = list(got["kinds"][1].values())
    for (base, tau), p, best in zip(TILTS, got["tilted"], got["best"]):
        for score, by_n in zip((p, values), best):
            shares = [0.0] * len(p)
            for triple in itertools.product(range(len(p)), repeat=3):
                top = max(score[kind] for kind in triple)
                winners = [kind for kind in triple if score[kind] == top]
                for kind in winners:
                    shares[kind] += math.prod(p[k] for k in triple) / len(winners)
            close(by_n[0], p, 1e-12)
            close(by_n[1], shares, 1e-12)
        likelihood, ratio = (math.fsum(s * v for s, v in zip(by_n[2], values)) for by_n in best)
        alone = math.fsum(s * v for s, v in zip(p, values))
        if base == "good" or tau < 1 / math.log(5):
            assert alone < likelihood <= ratio + 1e-12 and (
                likelihood == pytest.approx(ratio, abs=1e-4))
        elif tau == 1:
            assert likelihood < alone < ratio


# ---- what is shown ------------------------------------------------------------------------------

def test_sliders_change_what_is_shown(got):
    """A failure means that a number on the page is not the one that was computed."""
    first, second, third = got["shown"]
    assert first["modes"]["rows"][0][1:] == ["0.505", "1.986", "0.720"] == [
        f"{got['fits']['start'][1][0][key]:.3f}" for key in ("value", "mean", "std")]
    mean, std = gaussian.mixture_moments(gaussian.Settings())
    assert second["modes"]["rows"][0][2:] == [f"{mean:.3f}", f"{std:.3f}"]
    left = torch.distributions.Normal(mean, std).cdf(torch.tensor(0.0)).item()
    assert f"puts {left:.0%} of what it writes nearer the left mode, the demonstrator 40%" in (
        " ".join(second["modes"]["says"].split()))
    far = heterogeneity.expected_maximum(16)
    assert first["plane"]["rows"][0] == ["Init-SFT", f"{1 + far:.2f}", "0.00", "1.00"]
    assert "Init-SFT gains most" in first["plane"]["says"]
    assert "all are level" in second["plane"]["says"]           # leak = 1/q
    assert first["best-of-n"]["rows"][0][1:] == [f"{0.7 * far:.2f}", f"{far:.2f}"]
    assert "Golden rises as far as N goes" in first["best-of-n"]["says"]
    assert "falls from" in second["best-of-n"]["says"]
    heavy = got["heavy"][RHOS.index(0.7)][NS.index(16384)]
    assert third["best-of-n"]["rows"][0][1:] == [f"{heavy[key]:.2f}" for key in ("golden", "proxy")]
    for shown, base in ((first, "good"), (third, "idle")):
        kinds, _, _ = TextTask(base=base).tilted(next(iter(TextTask().prompts)), 1.0)
        assert shown["sharpening"]["rows"][1][1:5] == [f"{p:.0%}" for p in kinds.values()]
    for shown in got["shown"]:
        for part in shown.values():
            assert part["label"].endswith(part["says"]), "a screen reader is told something else"


def test_a_keyboard_and_a_phone_are_enough(got):
    """Every control is a native one with a label, and nothing is wider than the screen."""
    for tag, name, labels, tab_index in got["controls"]:
        assert tab_index == 0 and (labels == 1 or tag == "BUTTON"), name
    assert got["wide"] == [380, 0]


def test_colours_are_the_house_s(got):
    """Black becomes the ink, which is white on a dark screen."""
    assert {name: color.replace("var(--ink)", "#000000")
            for name, color in got["colors"].items()} == {name: COLORS[name]
                                                          for name in got["colors"]}


def test_nothing_is_loaded():
    """The page opens offline: the policy forbids every request, and none is in it."""
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in PAGE
    assert not re.search(r"<link|<img|\bsrc=|@import|url\(|fetch\(|import\(", PAGE)


@pytest.mark.parametrize("name", ["explore.html", "index.html"])
def test_links_lead_somewhere(name):
    for target in re.findall(r'href="([^"]+)"', (DOCS / name).read_text(encoding="utf-8")):
        file, _, section = target.partition("#")
        if not file.startswith("https://"):
            there = DOCS / file if file else DOCS / name
            assert there.is_file(), target
            assert not section or f'id="{section}"' in there.read_text(encoding="utf-8"), target
