"""The lessons: every checker against solutions, stubs, bugs and usual mistakes; every link and
command of the pages; and that what the lessons say in words holds in the committed results."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import afd
from model import GPT, GPTConfig
from toy_envs import token_mdp
from utils.cli import InputError, parse_settings
from utils.evaluate import mean_ci
from utils.tokenizer import bpe_tokenizer

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ROOT / "docs" / "lessons"


def module_at(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = module_at(LESSONS / "check.py")
results = module_at(ROOT / "docs" / "results.py")
NUMBERS = list(check.CHECKERS)
SOLUTIONS = {n: next((LESSONS / "solutions").glob(f"{n:02d}_*.py")) for n in NUMBERS}


# ---- the checkers --------------------------------------------------------------------------------

@pytest.mark.parametrize("number", NUMBERS)
def test_solutions_pass_and_stay_short(number):
    """A checker that refuses the solution, or a solution that no student would write."""
    state, message = check.check(number, LESSONS / "solutions")
    assert state == "solved", message
    name, file, line = re.fullmatch(r"solved. The project's own: (\S+) in (\S+), line (\d+)",
                                    message).groups()
    there = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1:int(line) + 2]
    assert re.search(rf"(def|class) {name.split('.')[-1]}\b", "\n".join(there))
    body = ast.parse(SOLUTIONS[number].read_text(encoding="utf-8")).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    assert len(functions) == 1
    assert functions[0].end_lineno - functions[0].lineno <= 10


STUB_SAYS = {9: "arguments are swapped", 10: "EOS that ends a response is not in the loss",
             11: "hard maximum", 12: "reward is not detached", 14: "0.55, 0.27, 0.18; the texts"}


@pytest.mark.parametrize("number", NUMBERS)
def test_stubs_and_bugs_fail_with_their_hint(number):
    state, message = check.check(number)
    assert STUB_SAYS.get(number, "returns None: not filled in yet") in message
    assert state == ("not right yet" if number in STUB_SAYS else "not started")


def test_exercises_and_solutions_pair_up():
    names = [sorted(path.name for path in (LESSONS / folder).glob("*.py"))
             for folder in ("exercises", "solutions")]
    assert names[0] == names[1] and len(names[0]) == len(NUMBERS)


# (exercise, what stands in the solution, the mistake in its place, words of the hint)
MISTAKES = [
    (1, "t >= ", "t > ", "first token is missing"),
    (1, "prompt_lengths[:, None]", "prompt_lengths[:, None] - 1", "prompt's last token"),
    (1, "t < lengths[:, None]", "t < lengths[:, None] - 1", "EOS is missing"),
    (1, "t < ", "t <= ", "a padding token is in it"),
    (1, "(t < lengths[:, None])", "(tokens != 0)", "goes by the id"),
    (1, "(t >= prompt_lengths[:, None]) & (t < lengths[:, None])",
     "(t >= prompt_lengths[:, None] - 1) & (t < lengths[:, None] - 1)", "are predicted"),
    (1, "(t >= prompt_lengths[:, None]) & (t < lengths[:, None])", "t >= prompt_lengths[:, None]",
     "Padding is in it"),
    (1, "(t >= prompt_lengths[:, None]) & (t < lengths[:, None])", "t < lengths[:, None]",
     "The prompt is in it"),
    (1, "(t >= prompt_lengths[:, None]) & (t < lengths[:, None])", "tokens != 0",
     "and the prompt is in it"),
    (1, "t < lengths[:, None]", "t < (prompt_lengths + lengths)[:, None]", "counts the prompt too"),
    (1, "return (t", "return 1 * (t", "tensor of bool"),
    (2, "-(logp", "(logp", "sign is wrong"),
    (2, "[:, :-1]", "[:, 1:]", "logits[:, t] predict tokens[:, t + 1]"),
    (2, "mask[:, 1:]", "mask[:, :-1]", "mask[:, 1:] goes with"),
    (2, ".sum(1).mean()", ".sum() / mask.sum()", "A mean over tokens"),
    (2, ".sum(1).mean()", ".sum()", "sum over responses"),
    (2, " * mask[:, 1:]", "", "mask is not used"),
    (2, ".log_softmax(-1)", "", "log_softmax is missing"),
    (2, "log_softmax", "softmax", "log is missing"),
    (2, ".sum(1).mean()", ".sum(1).mean().detach()", "carries no gradient"),
    (2, "-(logp * mask[:, 1:])", "logits.sum() * 0 - (logp.detach() * mask[:, 1:])",
     "The gradient is 0"),
    (2, ".sum(1).mean()", ".sum(1).mean().item()", "returns a float"),
    (2, ".mean()", "", "shape (8,); it should be ()"),
    (3, "softplus(-h_demo).mean() + F.softplus(h_policy)",
     "softplus(-h_policy).mean() + F.softplus(h_demo)", "labels are swapped"),
    (3, ".mean()", ".sum()", "Sums where means belong"),
    (3, "F.softplus(-h_demo).mean() + F.softplus(h_policy).mean()",
     "F.softplus(__import__('torch').cat([-h_demo, h_policy])).mean()", "One mean over both"),
    (3, "F.softplus(h_policy)", "F.softplus(-h_policy)", "Both have label 1"),
    (3, "F.softplus(-h_demo)", "-F.softplus(-h_demo)", "No usual mistake"),
    (3, "F.softplus(-h_demo)", "-h_demo.sigmoid().log()", "wrong at |h| = 800"),
    (3, " + F.softplus(h_policy).mean()", "", "policy's half is missing"),
    (3, "(-h_demo).mean() + F.softplus(h_policy).mean()",
     "(-h_demo).mean() / 2 + F.softplus(h_policy).mean() / 2", "Half of it"),
    (3, "return F.softplus(-h_demo).mean() +", "return -F.softplus(-h_demo).mean() -",
     "sign is wrong"),
    (3, "F.softplus(-h_demo).mean() + F.softplus(h_policy).mean()",
     "-h_demo.sigmoid().mean() - (-h_policy).sigmoid().mean()", "logs are missing"),
    (3, "(-h_demo).mean()", "(-h_demo.detach()).mean() + 0 * h_demo.sum()", "The gradient is 0"),
    (4, "h + torch.exp(h)", "-(h + torch.exp(h))", "sign is wrong"),
    (4, "h + torch.exp(h)", "-(torch.exp(h) - 1) * h", "FAIRL"),
    (4, "h + torch.exp(h)", "(torch.exp(h) - 1) * h", "This is f(u)"),
    (4, "h + torch.exp(h)", "h + 1 - torch.exp(-h)", "the witness"),
    (4, "h + torch.exp(h)", "torch.exp(h) - h", "one term of r"),
    (4, "h + torch.exp(h)", "h - torch.exp(h)", "one term of r"),
    (4, "h + torch.exp(h)", "h * torch.exp(h) + torch.exp(h) - 1 + (torch.exp(h) - 1) * h",
     "*minus* f(u)"),
    (4, "h + torch.exp(h)", "h + torch.exp(-h)", "in the exponent"),
    (4, "h + torch.exp(h)", "h", "reverse KL's reward"),
    (4, "h + torch.exp(h)", "torch.exp(h)", "forward KL's reward"),
    (4, "h + torch.exp(h)", "h - 1 + torch.log(h)", "not finite"),
    (5, "values[::-1]", "values", "order is wrong"),
    (5, "temperature * torch.logsumexp(Q / temperature, -1)", "Q.amax(-1)", "hard maximum"),
    (5, "temperature * torch.logsumexp(Q / temperature, -1)", "torch.logsumexp(Q, -1)",
     "temperature is not used"),
    (5, "temperature * torch", "torch", "in front of the logsumexp"),
    (5, "temperature * torch.logsumexp(Q / temperature, -1)",
     "((Q / temperature).softmax(-1) * Q).sum(-1)", "entropy is missing"),
    (5, "P @ V", "P.transpose(0, 2) @ V", "summed over the wrong state"),
    (5, "P @ V", "P @ V[:2]", "in line 8"),
    (6, "logp_sft - logp_init)", "logp_init - logp_sft)", "sign is wrong"),
    (6, "(ratio * mask).sum(1)", "(ratio * mask).sum(1) / mask.sum(1)", "A mean over tokens"),
    (6, " * mask", "", "mask is not used"),
    (6, "logp_init.maximum(logp_init.amax(-1, keepdim=True) + math.log(floor))", "logp_init",
     "floor is not used"),
    (6, "maximum(logp_init.amax(-1, keepdim=True) + math.log(floor))",
     "clamp(min=math.log(floor))", "floor is absolute"),
    (6, ".maximum", ".minimum", "lifts pi_0"),
    (6, "math.log(floor)", "floor", "its log is added"),
    (7, "gold.gather(1, scores.argsort(1))", "gold.sort(1).values", "It picks by gold"),
    (7, "gold.gather(1, scores.argsort(1))", "scores.sort(1).values", "mean *score*"),
    (7, "gold.gather(1, scores.argsort(1))", "gold", "old order"),
    (7, "scores.argsort(1)", "(-scores).argsort(1)", "worst of n"),
    (7, "comb(r, n - 1)", "comb(r, n)", "Off by one"),
    (7, ".sum(1).mean()", ".sum()", "A sum over prompts"),
    (7, "(by_score * weights).sum(1)", "by_score[:, -1]", "best of all N"),
    (7, "(by_score * weights).sum(1)", "gold.gather(1, scores[:, :n].argmax(1)[:, None])",
     "first n only"),
    (8, "- rewards\n", "\n", "No usual mistake"),
    (8, "rewards - others / (rewards.shape[1] - 1)", "rewards - rewards.mean(1)[:, None]",
     "holds the sample itself"),
    (8, "(rewards.shape[1] - 1)", "rewards.shape[1]", "Off by one"),
    (8, "return rewards - others", "return others", "This is the baseline"),
    (8, "rewards - others / (rewards.shape[1] - 1)", "rewards - rewards.mean(0)", "over prompts"),
    (8, "rewards - others / (rewards.shape[1] - 1)", "rewards - rewards.mean()", "One baseline"),
    (8, "return rewards - others / (rewards.shape[1] - 1)",
     "return -rewards + others / (rewards.shape[1] - 1)", "sign is wrong"),
    (8, "rewards - others / (rewards.shape[1] - 1)",
     "(rewards - rewards.mean(1)[:, None]) / rewards.std(1)[:, None]", "GRPO"),
    (9, '"sum"', '"batchmean"', "'batchmean' and 'mean' divide by N"),
    (9, 'log_pi, log_beta, reduction="sum"', 'log_beta, log_pi, reduction="batchmean"',
     "Two mistakes"),
    (10, "t < lengths[:, None]", "t < 99", "Now padding is in the loss"),
    (10, "t < lengths[:, None]", "t < lengths[:, None] - 1", "EOS is left out"),
    (10, " / mask.sum()", " / len(mask)", "A sum over t"),
    (11, "kl_coef * torch.logsumexp(Q / kl_coef + step_logp, -1)", "Q.amax(-1)", "costs nothing"),
    (11, "kl_coef * torch.logsumexp(Q / kl_coef + step_logp, -1)", "(step_logp.exp() * Q).sum(-1)",
     "A mean where"),
    (11, " + step_logp", "", "pi_SFT is missing"),
    (12, "return -(", "return (", "sign is wrong"),
    (12, " * logp)", " * logp.detach())", "carries no gradient"),
    (12, "    logp =", "    logits.mul_(2)\n    logp =", "No usual mistake"),
    (13, "F.pad(V[:, 1:] * mask[:, 1:], (0, 1))", "V", "of the *next* state off"),
    (13, "f - V_next", "f + V_next", "V(s') has the wrong sign"),
    (13, "(f - V_next)", "(V_next - f)", "The sign is wrong"),
    (13, " * mask[:, 1:]", "", "must be 0 after the response's last token"),
    (13, "F.pad(V[:, 1:] * mask[:, 1:], (0, 1))", "V.roll(-1, 1)", "wrapped round"),
    (13, "(f - V_next) * mask", "f - V_next", "mask is not used"),
    (13, "(f - V_next)", "f", "the logit alone"),
    (13, "(f - V_next)", "(f + V - V_next)", "counted twice"),
    (13, "(f - V_next)", "(f - V - V_next)", "V(s) is missing"),
    (13, "logits.logsumexp(-1)", "logits.amax(-1)", "hard maximum"),
    (14, "torch.randperm(len(lengths), generator=generator)", "torch.arange(len(lengths))",
     "All epochs are the same"),
    (14, "torch.randperm(len(lengths), generator=generator)",
     "torch.randint(len(lengths), (len(lengths),), generator=generator)", "once"),
    # a common compromise: random pools of a few batches, sorted within each
    (14, "return torch.randperm(len(lengths), generator=generator)",
     "pools = torch.randperm(len(lengths), generator=generator).view(2, -1)\n"
     "    return pools.gather(1, lengths[pools].argsort(1))", "length must not decide"),
]


@pytest.mark.parametrize("number, right, wrong, words", MISTAKES)
def test_usual_mistakes_get_their_hint(number, right, wrong, words, tmp_path):
    """A hint that never comes, or comes for the wrong mistake, sends the student astray."""
    source = SOLUTIONS[number].read_text(encoding="utf-8")
    assert right in source
    (tmp_path / SOLUTIONS[number].name).write_text(source.replace(right, wrong), encoding="utf-8")
    assert words in check.check(number, tmp_path)[1]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("body, words", [
    ("raise ValueError('a\\nb')", "stopped in line 2 with ValueError: a"),
    ("raise SystemExit(3)", "stopped in line 2 with SystemExit: 3"),
    ("return np.zeros(3)", "stopped in line 2 with NameError"),
    ("return 0.5", "returns a float, not a torch tensor"),
    ("return __import__('torch').zeros(7, 7)", "returns the shape (7, 7); it should be ("),
    ("return", "returns None"),
    ("return (", "stopped with SyntaxError: '(' was never closed"),
])
def test_what_any_file_may_do(number, body, words, tmp_path):
    """No exercise file may end in a traceback."""
    name = check.function_of(number)
    (tmp_path / f"{number:02d}_x.py").write_text(f"def {name}(*a):\n    {body}\n")
    assert words in check.check(number, tmp_path)[1]


@pytest.mark.parametrize("source, words", [
    (b"x = 1\n", "defines no function response_mask"), (b"import nothing_such\n", "in line 1"),
    (b"def response_mask():\n    return 1\n", "takes 0 positional arguments"),
    (b"\xff\xfe", "stopped with SyntaxError"), (b"\x00", "stopped with"), (b"", "no function")])
def test_files_that_are_no_answer(source, words, tmp_path):
    (tmp_path / "01_x.py").write_bytes(source)
    assert words in check.check(1, tmp_path)[1]
    assert "There is no file 02_" in check.check(2, tmp_path)[1]


def test_wrong_numbers_stand_beside_their_inputs(tmp_path):
    """An unknown mistake: the first wrong entry, and every argument with its name."""
    (tmp_path / "08_x.py").write_text("def leave_one_out(rewards):\n    return 2 * rewards\n")
    (tmp_path / "11_x.py").write_text("def soft_value(logp, reward, kl_coef):\n"
                                      "    return reward[0].sum(-1)\n")
    first, inputs = check.check(8, tmp_path)[1].splitlines()
    rewards = torch.tensor(ast.literal_eval(inputs.removeprefix("  rewards = ")))
    wrong, right = re.search(r"is (\S+) at \[0, 0\]; right is ([-.\d]+)\. ", first).groups()
    assert float(wrong) == pytest.approx(2 * rewards[0, 0].item(), abs=0.01)
    assert float(right) == pytest.approx((rewards[0, 0] - rewards[0, 1:].mean()).item(), abs=0.01)
    inputs = check.check(11, tmp_path)[1].splitlines()[1:]
    assert [line.split(" = ")[0].strip() for line in inputs] == ["logp[0]", "reward[0]", "kl_coef"]


def test_command_line(capsys, tmp_path):
    """No argument lists every exercise; a number answers for one; anything else is refused."""
    check.main([])
    with pytest.raises(SystemExit) as stop:
        check.main(["3"])
    assert int(stop.value.code) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(NUMBERS) + 2
    assert "not started" in lines[0] and "not right yet" in lines[8] and "None" in lines[-1]
    points = [int(re.search(r"(\d) points?", line)[1]) for line in lines[:-2]]
    assert lines[-2] == f"0 of {sum(points)} points"
    with pytest.raises(SystemExit) as stop:
        check.main(["--help"])
    assert not stop.value.code and "--folder" in capsys.readouterr().out
    for argv in (["0"], ["99"], ["x"], ["1", "2"], ["--nope"], ["--folder", str(tmp_path / "no")]):
        with pytest.raises(InputError):
            check.main(argv)


def test_graders_get_lines_of_json(capsys, tmp_path):
    """A folder of a student's own with one solved exercise that prints, and one wrong one."""
    source = SOLUTIONS[8].read_text(encoding="utf-8")
    source = source.replace("    others", "    print('hm')\n    others")
    (tmp_path / "08_mine.py").write_text(source)
    (tmp_path / "09_mine.py").write_text("def forward_kl(a, b):\n    return (a - b).sum()\n")
    check.main(["--json", "--folder", str(tmp_path)])
    captured = capsys.readouterr()
    found = {record["number"]: record for record in map(json.loads, captured.out.splitlines())}
    assert list(found) == NUMBERS and captured.err == "hm\n"
    assert {n: r["state"] for n, r in found.items() if r["state"] != "not started"} == {
        8: "solved", 9: "not right yet"}
    assert {n: r["points"] for n, r in found.items() if r["points"]} == {8: check.effort(8)[1]}
    assert "log_beta" not in found[9]["message"] and "a = [" in found[9]["message"]


# ---- links, commands, numbers --------------------------------------------------------------------

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *LESSONS.glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_images_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, section = target.partition("#")
        if not name.startswith("https://"):
            there = page.parent / name if name else page
            assert there.exists(), f"{page.name} links to {name}, which is not there"
            assert not section or section in headings(there), f"{page.name}: no section {target}"


def headings(page):
    """The anchors that GitHub gives to a page's headings, and the ids of an HTML page."""
    if page.suffix == ".html":
        return set(re.findall(r'\bid="([\w-]+)"', page.read_text(encoding="utf-8")))
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def commands(text):
    """The `python …` commands of a page: whole lines of code blocks, and code within a line."""
    found = re.findall(r"^ *(python [^#\n]+)|`(python [^`]+)`", text, re.M)
    return [shlex.split((line or code).replace("…", " ")) for line, code in found]


def refuse(command):
    """Why this command would not start, or None. Nothing is run."""
    words = command[2:] if command[1] == "-m" else command[1:]
    script, flags = words[0], words[1:]
    if command[1] == "-m":
        script = script.replace(".", "/") + ".py"
    if not (ROOT / script).is_file():
        return f"there is no {script}"
    if script == "docs/lessons/check.py":
        try:
            check.parse(flags)
        except InputError as error:
            return str(error)
        return None
    if script.startswith(("docs/", "tests/")):      # these take words, no flags
        return next((f"{script} has no flag {flag}" for flag in flags if flag[0] == "-"), None)
    if flags and flags[-1] == "--demos":            # the README speaks of `python afd.py --demos`
        flags = [*flags, "FILE"]
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if not hasattr(module, "Settings"):
        return f"{script} is no script"
    try:
        settings = parse_settings(module.Settings, flags)
        if module is afd:
            afd.check(settings)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_known(page):
    for command in commands(page.read_text(encoding="utf-8")):
        if len(command) > 1:
            assert refuse(command) is None, f"{page.name}: {' '.join(command)}"


@pytest.mark.parametrize("command", [
    "python nothing.py", "python afd.py --nope", "python train.py sft --demos x",
    "python afd.py --methods cook", "python afd.py --methods 'po init-sft'",
    "python afd.py --gold x", "python -m toy_envs.nothing", "python -m toy_envs.gaussian --nope",
    "python docs/lessons/check.py --nope", "python afd.py --task baking"])
def test_a_wrong_command_is_noticed(command):
    assert refuse(shlex.split(command))


def lesson(number):
    return next(LESSONS.glob(f"{number}_*.md")).read_text(encoding="utf-8")


def section(text, name):
    """The text below a heading, up to the next one."""
    return re.split(r"^## ", text.split(f"\n## {name}\n")[1], flags=re.M)[0]


def numbered(text):
    """The numbers of the lines "1. ...", "2. ..." of a list."""
    return [int(number) for number in re.findall(r"^(\d+)\. ", text, re.M)]


def test_lesson_0_is_one_page():
    text = lesson(0)
    assert text.count("\n") <= 95 and max(map(len, text.splitlines())) <= 120
    assert numbered(section(text, "Quiz")) == [1, 2, 3] and text.count("<summary>Answer<") == 3


@pytest.mark.parametrize("number", [*range(1, 9), 10, 11])
def test_a_lesson_has_all_its_parts_on_one_page(number):
    """Each prediction has its numbered answer, each question and each task on paper its solution;
    all of them are folded."""
    text = lesson(number)
    parts = re.findall(r"^## (.+)$", text, re.M)
    assert parts == ["Claim", "Predict", "Run", "Notice", "Exercise", "Quiz"], parts
    head = re.findall(r"^- \*\*(\w+):\*\* .+\.$", text.split("\n## Claim\n")[0], re.M)
    assert head == ["Time", "Before", "Goals"]
    questions = numbered(section(text, "Predict"))
    answers = section(text, "Notice").partition("</details>")[0]
    assert answers.startswith("\n<details><summary>Answers to the predictions</summary>\n\nSource:")
    assert questions == numbered(answers) == list(range(1, len(questions) + 1)) and questions[2:]
    quiz = section(text, "Quiz")
    assert numbered(quiz) == [1, 2, 3] and quiz.count("<details><summary>Answer</summary>") == 3
    exercise = section(text, "Exercise")
    assert ("on paper" in exercise.lower()) == ("<details><summary>Solution</summary>" in exercise)
    assert text.count("<details><summary>") == text.count("</summary>") == text.count("</details>")
    assert "](../figures/" in text and commands(text)
    if number < 9:
        assert f"docs/lessons/check.py {number}" in text and f"exercises/{number:02d}_" in text
    unfolded = re.sub(r"<details>.*?</details>", "", text.split("\n## Quiz\n")[0], flags=re.S)
    assert 50 <= unfolded.count("\n") <= 105 and max(map(len, text.splitlines())) <= 120


TABLES = "\n".join(re.findall(r"^\|.*", "\n".join(
    page.read_text(encoding="utf-8") for page in results.PAGES), re.M))
KNOWN = {number.removeprefix("-") for number in re.findall(results.NUMBER, TABLES)}
FILLED = not re.findall(r"^\|[^|]*\|[ –|]*$", TABLES, re.M)       # no line that holds nothing
REMADE = pytest.mark.skipif(not FILLED, reason="results.md waits for its runs")


@REMADE
@pytest.mark.parametrize("page", [*sorted(LESSONS.glob("*.md")), ROOT / "docs" / "teaching.md"],
                         ids=lambda page: page.stem)
def test_numbers_of_lessons_stand_in_the_tables(page):
    """Each "mean ± half-width" is a cell of a table that is filled from the runs (a sentence may
    drop its sign). New results change the table, and this test names what has become old."""
    text = page.read_text(encoding="utf-8")
    numbers = re.findall(results.NUMBER, re.sub(r"```.*?```", "", text, flags=re.S))
    assert {number.removeprefix("-") for number in numbers} <= KNOWN


def test_lessons_1_and_2_quote_what_the_world_prints():
    """What has a closed form, worked out again: shares of lesson 1, forward KL of lesson 2."""
    for memory, length in ((0, 6), (0, 14), (1, 6), (1, 10), (1, 18)):
        [(_, share, _)] = token_mdp.horizon_curve([length], memory)
        assert re.search(f"{share:.3f} (at|from) T = {length}\\b", lesson(1))
    demo = token_mdp.demonstrator_of(token_mdp.Settings())
    for memory in (0, 1):
        logp = token_mdp.sequence_log_prob(token_mdp.sft_optimum(demo, memory).log()[None])[0]
        line = "Forward KL: precision {precision:.3f}, recall {recall:.3f}."
        assert line.format(**token_mdp.describe(demo, logp)) in lesson(2)


def test_the_stages_are_a_library(tmp_path, monkeypatch, capsys):
    """Lesson 8's program runs as it stands, with small files in place of GPT-2's and one's own."""
    [program] = re.findall(r"```python\n(.*?)```", lesson(8), re.S)
    texts = [f"{word} water, {word} egg." for word in ("boil", "cool", "salt", "stir")] * 5
    tokenizer = bpe_tokenizer(texts, 300)
    GPT(GPTConfig(len(tokenizer), n_positions=512, n_embd=8, n_layer=1, n_head=2,
                  suppress_tokens=tokenizer.suppress, eos_token_id=tokenizer.eos)
        ).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    records = [{"prompt": f"How {i}?", "response": text} for i, text in enumerate(texts)]
    (tmp_path / "FILE").write_text("\n".join(json.dumps(record) for record in records))
    monkeypatch.chdir(tmp_path)
    exec(program, found := {})
    assert found["scores"].shape == (16,) and len(found["items"]) == len(texts)
    best = found["candidates"][found["scores"].argmax()]
    assert found["tok"].decode(best) in capsys.readouterr().out


# ---- what the pages say in words -----------------------------------------------------------------

def test_lesson_2_on_length_bias():
    """Its corpus, trained on: a policy that only chooses a length, gradient descent on the batches'
    mean losses. A failure means that lesson 2 gives the wrong answer."""
    lengths = torch.tensor([10] * 64 + [40] * 64)
    for rows, short in ((torch.arange(128).view(-1, 16), 4 / 5),        # each batch of one length
                        (torch.arange(128).view(16, -1).T, 1 / 2)):     # half and half in each
        logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        for _ in range(400):
            logp = logits.log_softmax(0)[(lengths[rows] == 40).long()]
            loss = -(logp.sum(1) / lengths[rows].sum(1)).mean()
            with torch.no_grad():
                logits -= 20 * torch.autograd.grad(loss, logits)[0]
        assert logits.softmax(0)[0].item() == pytest.approx(short, abs=1e-4)


DATA = json.loads(results.COLLECTED.read_text(encoding="utf-8"))


def test_tables_and_numbers_are_those_of_the_results():
    """A number edited by hand, or new results of which only a half was committed, shows here."""
    texts = {page.name: page.read_text(encoding="utf-8") for page in results.PAGES}
    assert results.outdated(texts, DATA) == []
    page = texts["results.md"]
    cell, speed = re.search(r"\| (\S+) ± ", page)[1], results.speed()[0][2]
    for wrong in (page.replace(f"| {cell} ± ", f"| {cell}1 ± ", 1),
                  page.replace(f"| {speed} |", f"| {speed}1 |", 1),
                  page.replace("| irft |", "| irtf |", 1), page + "\nIt is 98.76 ± 5.43.\n"):
        assert wrong != page and results.outdated({"results.md": wrong}, DATA)


def test_a_cell_is_the_mean_over_seeds():
    """Two groups of two seeds each; best of 64 stands on the curve; what is unknown is a dash."""
    data = {"best_of_n": [{"group": "a", "seed": k, "reward_model": "x", "n": 64, "golden": 2.0 + k}
                          for k in (0, 1)],
            "rows": [{"group": group, "seed": k, "name": name, "golden": g, "kl": None}
                     for group in "ab" for k, name, g in (
                         (0, "best of 16, x", 1.0), (1, "best of 16, x", 3.0), (0, "pi_SFT", 0.0),
                         (1, "pi_SFT", 2.0), (0, "best of 16, golden", 2.0),
                         (1, "best of 16, golden", 4.0))]}
    x = "best of 16, x"
    for line, key, cell in (
            (x, "a golden ±", "2.00 ± 12.71"),          # Student's t of one degree of freedom
            (x, "a golden", "2.00"), (x, "a share ±", "50% ± 0%"), (x, "a kl ±", "–"),
            (f"{x} − pi_SFT", "a+b golden ±", "1.00 ± 0.00"), ("best of 64, x", "a golden", "2.50"),
            (f"best of 64, x − {x}", "a golden", "0.50"), ("y", "a golden", "–")):
        assert results.cell(data, line, key) == cell, (line, key)


def gain(group, a, b, column="golden"):
    """(mean, half-width) over seeds of a's column less b's."""
    x, y = (results.values(DATA, group, name, column) for name in (a, b))
    if not FILLED and not (x and y):
        pytest.skip("results.md waits for its runs")
    assert x and x.keys() == y.keys(), (group, a, b)
    return mean_ci(results.difference(DATA, group, a, b, column))


def share(group, name):
    """(mean, half-width) of a selector's share of the golden selector's gain at N = 16."""
    return mean_ci([*results.values(DATA, group, f"best of 16, {name}", "share").values()])


INIT_SFT, INIT_DEMO, SFT_DEMO = (f"best of 16, {x}" for x in ("init-sft", "init-demo", "sft-demo"))
PER_TOKEN, RANDOM = "best of 16, likelihood per token", "best of 16, random"
GOOD = "good-helpful-h0"
SENTENCES = [    # (lesson, what it says, group, a, b): a is above b, the interval excludes zero
    (3, "adversarial imitation falls behind the trained discriminator", GOOD, INIT_SFT,
     "adversarial, reverse_kl"),
    (2, "closer in reverse KL is not better written", "small", "pi_SFT",
     "adversarial-exact, reverse_kl"),
    *[(6, f"Init-SFT goes beyond the demonstrations, {g}", g, INIT_SFT, "demonstrations")
      for g in ("good-helpful-h0", "good-helpful-h1", "good-harmless-h0", "good-harmless-h1",
                "idle-helpful-h0")],
    *[(6, f"with marks {x} picks worse than chance, {task}", f"good-{task}-h1", RANDOM, x)
      for task in ("helpful", "harmless") for x in (INIT_DEMO, SFT_DEMO)],
    *[(6, "the plain log-ratio is below the trained model", f"good-{task}-h{h}", INIT_SFT,
       "best of 16, log-ratio") for task in ("helpful", "harmless") for h in "01"],
    *[(7, "the closed form of the plain log-ratio ends below pi_0", g, "pi_0",
       "closed form, log-ratio 0.3") for g in ("good-helpful-h0", "good-harmless-h0",
                                               "idle-helpful-h0")],
    (7, "on an idle base likelihood per token is worse than chance", "idle-helpful-h0", RANDOM,
     PER_TOKEN),
    (7, "and Init-SFT is not", "idle-helpful-h0", INIT_SFT, RANDOM),
    (7, "nor is a temperature what Init-SFT is", "idle-helpful-h0", INIT_SFT, "temperature, 0.5"),
    (7, "nor the floor", "idle-helpful-h0", "closed form, floored 0.3", "temperature, 0.3"),
    (7, "likelihood prefers what is short", GOOD, PER_TOKEN, "best of 16, likelihood"),
]
LEVEL = [   # (lesson, sentence, group, a, b): a is not below b: the interval reaches zero or above
    *[(6, "Init-Demo is level without marks", g, INIT_DEMO, INIT_SFT)
      for g in ("good-helpful-h0", "good-harmless-h0", "idle-helpful-h0")],
    *[(7, "likelihood per token picks as well on a good base", f"good-{task}-h{h}", PER_TOKEN,
       INIT_SFT) for task in ("helpful", "harmless") for h in "01"],
    *[(7, "optimising against Init-SFT ends where best of 16 is", f"good-{task}-h0",
       "policy optimisation, init-sft 0.3", INIT_SFT) for task in ("helpful", "harmless")],
]


@pytest.mark.parametrize("number, sentence, group, a, b", SENTENCES)
def test_what_lessons_say_is_what_came_out(number, sentence, group, a, b):
    """New results may overturn a sentence: then that lesson has to be rewritten, not this test."""
    mean, half = gain(group, a, b)
    assert mean - half > 0, f"lesson {number}: {sentence}"


@pytest.mark.parametrize("number, sentence, group, a, b", LEVEL)
def test_what_lessons_say_is_level(number, sentence, group, a, b):
    mean, half = gain(group, a, b)
    assert mean + half >= 0, f"lesson {number}: {sentence}"


@REMADE
def test_what_lessons_say_of_the_heads():
    for h in "01":
        mine, last = (share(f"{group}-h{h}", "init-sft") for group in ("good-helpful", "last"))
        assert last[0] + last[1] < mine[0] - mine[1], "lesson 6: the last token's head gains less"


@REMADE
def test_what_lessons_say_of_imitation():
    for name in ("adversarial, reverse_kl", "adversarial, forward_kl"):
        kl = results.values(DATA, GOOD, name, "kl")
        assert max(kl.values()) < 0.5, "lesson 3: adversarial imitation hardly moves"
    exact = [f"adversarial-exact, {name}" for name in ("reverse_kl", "forward_kl")]
    for group, left in ((GOOD, 0.6), ("small", 0.4)):
        sft, seek = (mean_ci([*results.values(DATA, group, name, "reverse_kl").values()])[0]
                     for name in ("pi_SFT", exact[0]))
        assert seek < left * sft, "lesson 3: it closes a half of the reverse KL, or more"
        mean, half = gain(group, *exact, "forward_kl")
        assert mean - half > 0, f"lesson 2: the two differ in forward KL, {group}"
        mean, half = gain(group, *exact, "entropy")
        assert mean + half < 0, f"lesson 2: the two differ in entropy, {group}"


def test_lesson_6_on_the_proxies():
    """With marks the misled promise the most: their own score rises most from N = 1 to 16."""
    proxy = {(p["reward_model"], p["n"], p["seed"]): p["proxy"] for p in DATA["best_of_n"]
             if p["group"] == "good-helpful-h1"}
    rises = {name: sum(proxy[name, 16, k] - proxy[name, 1, k] for k in range(5)) / 5
             for name in ("init-demo", "sft-demo", "init-sft")}
    assert min(rises["init-demo"], rises["sft-demo"]) > 2 * rises["init-sft"]
