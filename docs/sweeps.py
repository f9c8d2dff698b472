"""What the main tables hold fixed: how well pi_SFT is trained, the floor, the labels, the language.

    python docs/sweeps.py good-helpful-h0 3

goes on from the run of this group and seed in out/results (`make results` does both) and writes
out/results/sweeps/good-helpful-h0-s3.json: rows of golden reward, as in results.json. pi_0 and its
samples are the run's own, and so is everything at the run's own settings. Golden reward is the mean
over the held-out prompts; a part of harmless is also given for benign and harmful prompts alone.
"""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]      # this script lives in docs/

import afd                                                              # noqa: E402
import train                                                            # noqa: E402
from divergences import bradley_terry_loss, discriminator_loss          # noqa: E402
from model import GPT, generate                                         # noqa: E402
from results import ALPHAS, NOISE, RUNS, SCHEDULES                      # noqa: E402
from reward import LogRatio, RewardModel, TokenExtrapolation, score     # noqa: E402
from toy_envs.text_tasks import TextTask, text_world                    # noqa: E402
from utils.checkpoints import Run                                       # noqa: E402
from utils.cli import write_json                                        # noqa: E402
from utils.evaluate import SAMPLES, Evaluator, log_likelihood, sample_responses     # noqa: E402

REWARD_EPOCHS = (0.5, 1, 2)
N = 16
DISCRIMINATORS = ("init-sft", "init-demo", "sft-demo")


class Sweep:
    """One run that has finished, and the rows of what is varied in it."""
    PREDICTED = 64         # the demonstrator's own samples to each prompt, of exact()

    def __init__(self, group, seed):
        folder = RUNS / f"{group}-s{seed}"
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.s, self.group, self.seed, self.rows = afd.Settings(**config["settings"]), group, seed, []
        self.world = text_world(self.s, seed)
        self.run = Run(folder, seed, torch.device("cpu"), self.world.tokenizer)
        self.init = GPT.from_pretrained(self.s.init) if self.s.init else self.run.load("init", GPT)
        self.sft = self.run.load("sft", GPT)
        pairs = self.run.load_json("samples")
        self.from_init, self.from_sft = ([(x, y) for x, y in side] for side in pairs)
        self.demos = [self.world.pair(x, y) for x, y in self.world.demos]
        task = TextTask(self.s.task)
        self.harmful = np.array([task.prompts[x] in task.harmful for x in self.world.test_prompts])

    def candidates(self, policy):
        return sample_responses(self.world, policy, N, self.run.generator("candidates samples"))

    def add(self, group, name, golden, **more):
        """A row; golden (P,) or (P, M), points, of each held-out prompt. Of harmless three rows."""
        parts = {"": np.full(len(self.harmful), True)}
        if self.harmful.any():
            parts |= {"-benign": ~self.harmful, "-harmful": self.harmful}
        for part, which in parts.items():
            self.rows.append({"group": group + part, "seed": self.seed, "name": name,
                              "golden": float(golden[which].mean()), **more})

    def add_selectors(self, group, candidates, scores, **more):
        """Rows of pi_SFT and of the best of N by each of scores {name: (P, N)} and by golden."""
        self.add(group, "pi_SFT", candidates.golden, **more)
        for name, values in {**scores, "golden": candidates.golden}.items():
            picks = values.reshape(candidates.golden.shape).argmax(1)[:, None]
            self.add(group, f"best of {N}, {name}",
                     np.take_along_axis(candidates.golden, picks, 1))

    def data(self, written, label_noise=0.0):
        """What each reward model is trained and held out on, as in afd.run; written: y ~ pi_SFT."""
        rng = self.run.rng("rewards")
        labelled = self.world.preference_pairs(written, label_noise, self.run.rng("labels"))
        return {"init-sft": train.split(list(zip(written, self.from_init)), rng),
                "init-demo": train.pair_up(self.demos, self.from_init, rng),
                "sft-demo": train.pair_up(self.demos, written, rng),
                "preference": train.split(labelled, rng)}

    def reward(self, name, data, loss=discriminator_loss, **changes):
        """A reward model trained as the run's own, but for the changes."""
        return train.train_reward(
            RewardModel(self.init, self.s.head), *data, loss, replace(afd.REWARD, **changes),
            self.run.rng(name), name)[0]

    # ---- the sweeps -----------------------------------------------------------------------------

    def quality(self, schedules):
        """How good must pi_SFT be? Its schedule is varied, all that follows from it is done anew."""
        for lr, epochs in schedules:
            if (lr, epochs) == (afd.SFT.lr, self.s.sft_epochs):     # the run's own
                policy, history = self.sft, self.run.history("sft")
                rewards = {name: self.run.load(name, RewardModel) for name in DISCRIMINATORS}
            else:
                policy, history, rewards = self.train(lr, epochs)
            rewards |= {name: LogRatio(policy, self.init, floor)
                        for name, floor in afd.FLOORS.items()}
            candidates = self.candidates(policy)
            evaluator = Evaluator(self.world, policy, candidates, candidates, self.run)
            evaluator.add_reference_rows()
            self.add_selectors(
                f"{self.group}-sft-{lr:g}x{epochs:g}", candidates,
                {**{name: score(reward, candidates.pairs) for name, reward in rewards.items()},
                 "likelihood per token": evaluator.sft_logp / candidates.lengths},
                held_out=min(record["held_out"] for record in history if "held_out" in record),
                forward_kl=evaluator.rows[0]["forward_kl"])

    def train(self, lr, epochs):
        """(pi_SFT, its history, the reward models that follow from it), with another schedule."""
        rng = self.run.rng("sft")
        policy, history = train.fine_tune(self.init, *train.split(self.demos, rng),
                                          replace(afd.SFT, lr=lr, epochs=epochs), rng)
        xs = [x for x, _ in self.from_init[::2]]
        ys = generate(policy, xs, 2, max_new_tokens=self.world.max_response,
                      generator=self.run.generator("y ~ pi_SFT"))
        data = self.data([(x, y) for x, two in zip(xs, ys) for y in two])
        return policy, history, {name: self.reward(name, data[name]) for name in DISCRIMINATORS}

    def floors(self):
        """From the log-ratio (0) to log pi_SFT up to a term of the state (1): reward and policy."""
        candidates, group = self.candidates(self.sft), f"{self.group}-floors"
        self.add_selectors(group, candidates, {
            f"floor {alpha:g}": score(LogRatio(self.sft, self.init, alpha), candidates.pairs)
            for alpha in ALPHAS})
        for alpha in ALPHAS:
            policy = TokenExtrapolation(self.sft, self.init, 0.3, alpha)
            written = sample_responses(self.world, policy, SAMPLES,
                                       self.run.generator("closed form samples"))
            self.add(group, f"closed form, floor {alpha:g}", written.golden)

    def noise(self):
        """A share of the preference labels is swapped."""
        candidates = self.candidates(self.sft)
        for share in NOISE:
            model = self.reward("preference", self.data(self.from_sft, share)["preference"],
                                bradley_terry_loss)
            self.add_selectors(f"{self.group}-noise-{share:g}", candidates,
                               {"preference": score(model, candidates.pairs)})

    def longer(self):
        """Is Init-SFT's reward model undertrained? The run trains it for one epoch."""
        candidates, data = self.candidates(self.sft), self.data(self.from_sft)["init-sft"]
        for epochs in REWARD_EPOCHS:
            if epochs == afd.REWARD.epochs:     # the run's own
                model = self.run.load("init-sft", RewardModel)
            else:
                model = self.reward("init-sft", data, epochs=epochs)
            self.add_selectors(f"{self.group}-reward-{epochs:g}", candidates,
                               {"init-sft": score(model, candidates.pairs)})

    def exact(self):
        """Theory's prediction: the demonstrator's own samples, picked by exact densities.

        likelihood is log d_beta, the ratio log d_beta - log d_base, which is golden/tau - log Z(x)
        on the language. `off` is how far pi_0 is from the base: KL(d_base || pi_0), nats.
        """
        task = TextTask(self.s.task, base=self.s.base)
        rng, n = random.Random(f"{self.seed} exact"), self.PREDICTED
        tables = {name: np.empty((len(self.world.test_prompts), n)) for name in
                  ("golden", "likelihood", "likelihood per token", "ratio")}
        base, pairs = [], []
        for i, x in enumerate(self.world.test_prompts):
            for j in range(n):
                y = task.demonstrate(x, rng)
                logp, length = task.demo_logp(x, y), len(self.world.pair(x, y)[1])
                values = (task.golden(x, y), logp, logp / length, logp - task.logp(x, y))
                for table, value in zip(tables.values(), values):
                    table[i, j] = value
            for _ in range(SAMPLES):
                y = task.sample(x, rng)
                base.append(task.logp(x, y))
                pairs.append(self.world.pair(x, y))
        own = log_likelihood(self.init, pairs)
        group = f"exact-{self.s.base}-{self.s.task}"
        self.add(group, "demonstrations", tables["golden"], off=float(np.mean(base - own)))
        for size in (N, n):
            golden = tables["golden"].reshape(-1, n // size, size)
            for name, table in tables.items():
                picks = table.reshape(golden.shape).argmax(-1)[..., None]
                self.add(group, f"best of {size}, {name}",
                         np.take_along_axis(golden, picks, -1)[..., 0])


def main():
    group, seed = sys.argv[1], int(sys.argv[2])
    sweep = Sweep(group, seed)
    good, plain = group.startswith("good"), group.endswith("h0")
    sweep.floors()
    if plain:
        sweep.exact()
    if good:
        # With marks two of them: the schedule of the tables before the loss was mended, and the own.
        sweep.quality(SCHEDULES if plain else (SCHEDULES[1], SCHEDULES[-1]))
    if good and plain:
        sweep.longer()
    if group == "good-helpful-h0":
        sweep.noise()
    (RUNS / "sweeps").mkdir(exist_ok=True)
    write_json(RUNS / "sweeps" / f"{group}-s{seed}.json", sweep.rows, indent=None)


if __name__ == "__main__":
    main()
