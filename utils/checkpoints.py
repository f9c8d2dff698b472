"""Checkpoints in the format of transformers' GPT-2, and the folder of a run.

    config.json, generation_config.json         shape of the model; tokens that it never writes
    model.safetensors or pytorch_model.bin      tensors, under GPT-2's names, "transformer." or not;
                                                or the parts that a .index.json names
    tokenizer.json, or vocab.json + merges.txt  the tokenizer: see utils/tokenizer.py

AutoModelForCausalLM and AutoTokenizer open what is written here, with equal logits and token ids.
Files are data: only tensors are read from them, never code. What GPT cannot compute is refused by
name.
"""

import json
import platform
import random
import shlex
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import tokenizers
import torch

from model import GPT, GPTConfig
from utils.cli import (InputError, load_json, make_folder, refuse_pointer, require, write_aside,
                       write_json)
from utils.tokenizer import Tokenizer

# Fields of config.json and the values with which GPT computes the same; the first if it is absent.
COMPUTED = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,), "tie_word_embeddings": (True,)}
# Files of weights, the preferred one first, and what is read beside them where it is there.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt",
          "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
          "reward_head.pt")


# ---- a checkpoint is written --------------------------------------------------------------------

def save_gpt(folder, policy):
    """Write a policy's config.json, generation_config.json and model.safetensors.

    In transformers the suppressed tokens have finite logits: there generate() leaves them out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**{field: values[0] for field, values in COMPUTED.items()}, **asdict(policy.config),
              "bos_token_id": policy.config.eos_token_id, "n_ctx": policy.config.n_positions,
              "n_inner": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
              "architectures": ["GPT2LMHeadModel"]}
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation["suppress_tokens"] = config.pop("suppress_tokens") or None
    from safetensors.torch import save_file
    tensors = {f"transformer.{name}": tensor.contiguous()
               for name, tensor in conv1d(policy.state_dict()).items()}
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", config)
    write_aside(folder / WEIGHTS[0], lambda part: save_file(
        tensors, part, metadata={"format": "pt"}))      # older transformers ask for this "pt"


def conv1d(tensors):
    """From GPT-2's layout of weights, (in, out), to that of nn.Linear, (out, in), or back."""
    layers = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {k: t.transpose(0, -1) if k.endswith(layers) else t for k, t in tensors.items()}


# ---- a checkpoint is read -----------------------------------------------------------------------

@contextmanager
def loading(name):
    """The folder `name`, or else the hub's checkpoint of that name, fetched to the hub's cache.

    Whatever goes wrong while it is read is an InputError of one line.
    """
    is_folder = Path(name).is_dir()
    try:
        yield Path(name) if is_folder else fetch(name)
    except Exception as error:      # each library has its own kinds of error for a foreign file
        tried = "" if is_folder else "no such folder; as a name on the Hugging Face hub: "
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{name}: cannot be loaded: {tried}{reason}") from error


def fetch(name):
    """The hub's checkpoint of that name, as a folder in the hub's cache. A repository may hold the
    same weights in a dozen forms: the second form is asked for only where the first is missing."""
    from huggingface_hub import snapshot_download      # the tokenizers library needs it, too
    for weights in WEIGHTS:
        stem, _, kind = weights.partition(".")
        folder = Path(snapshot_download(name, allow_patterns=[
            *BESIDE, weights, f"{weights}.index.json", f"{stem}-*-of-*.{kind}"]))
        if any(folder.glob(f"{weights}*")):         # the file itself, or the index of its parts
            break
    return folder


def first_of(folder, *names):
    """The path of the first of these files that is there. Raises ValueError if none is."""
    for name in names:
        if (folder / name).is_file():
            refuse_pointer(folder / name)
            return folder / name
    raise ValueError(f"{' or '.join(names)} is missing")


def end_ids(folder):
    """The ids that eos_token_id names as a text's end: a list, since it may hold one or several."""
    for name in ("generation_config.json", "config.json"):
        ids = (load_json(folder / name) or {}).get("eos_token_id")
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []


def load_gpt(name, trunk=False):
    """The GPT of a checkpoint folder or of a name on the hub.

    A tokenizer that lies beside the weights must fit them. It tells which token ends a text, and
    which ids have no text: those are never sampled. Many a vocabulary is padded to a round number.
    trunk: the folder may be a reward model's, whose trunk is no policy: what it would write has no
    sense. Raises InputError naming what is missing or does not fit.
    """
    with loading(name) as folder:
        if (folder / "reward_head.pt").is_file() and not trunk:
            raise ValueError("a reward model, not a policy")
        config = read_config(folder)
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        tokenizer = Tokenizer.from_pretrained(folder)
        ids = {*tokenizer.backend.get_vocab().values()}
        require(max(ids) < config.vocab_size, f"{name}: the tokenizer has ids up to {max(ids)}, "
                f"but vocab_size is {config.vocab_size}")
        config.eos_token_id, config.pad_token_id = tokenizer.eos, tokenizer.pad
        no_text = {*range(config.vocab_size)} - ids | {*tokenizer.suppress}
        config.suppress_tokens = tuple(sorted({*config.suppress_tokens} | no_text))
    with loading(folder):
        policy = GPT(config)
        read_weights(weight_files(folder), policy)
    return policy


def read_config(folder):
    """The GPTConfig of a folder. Raises ValueError naming a field that GPT cannot compute with."""
    raw = load_json(first_of(folder, "config.json"))
    for field, values in {**COMPUTED, "n_inner": (None, 4 * raw.get("n_embd", 0))}.items():
        if raw.get(field, values[0]) not in values:
            raise ValueError(f"{field} is {raw[field]!r}, not {' or '.join(map(repr, values))}")
    for field in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        if not isinstance(raw.get(field), int) or raw[field] < 1:
            raise ValueError(f"{field} is {raw.get(field)!r}, not a positive whole number")
    if raw["n_embd"] % raw["n_head"]:
        raise ValueError(f"n_embd {raw['n_embd']} is not a multiple of n_head {raw['n_head']}")
    config = GPTConfig(**{f.name: raw[f.name] for f in fields(GPTConfig) if f.name in raw})
    config.eos_token_id = next((i for i in end_ids(folder) if i < config.vocab_size), None)
    # Checkpoints from before there was a generation_config.json have its fields in config.json.
    generation = load_json(folder / "generation_config.json") or raw
    config.suppress_tokens = tuple(generation.get("suppress_tokens") or ())
    return config


def weight_files(folder):
    """The files of a checkpoint's weights: one, or the parts that an index names. Raises ValueError
    if there are none."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file() and not (folder / name).is_file():
            parts = {*load_json(index)["weight_map"].values()}
            return [first_of(folder, part) for part in sorted(parts)]
    return [first_of(folder, *WEIGHTS)]


def read_weights(paths, policy):
    """Fill a GPT from weights files: only tensors are read, never code. Raises ValueError naming
    tensors that are missing, unknown or misshapen, with shapes as in the files."""
    raw = {}
    for path in paths:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            raw.update(load_file(path))
        else:
            raw.update(torch.load(path, map_location="cpu", weights_only=True))
    mask = (".attn.bias", ".attn.masked_bias")      # older files hold the causal mask as well
    theirs = {k.removeprefix("transformer."): t for k, t in raw.items() if not k.endswith(mask)}
    head, ours = theirs.pop("lm_head.weight", None), conv1d(policy.state_dict())
    if head is not None and not torch.equal(head, theirs.setdefault("wte.weight", head)):
        raise ValueError("lm_head.weight is not wte.weight: untied heads are not computed here")
    wrong = [f"{k} is missing" for k in ours.keys() - theirs.keys()]
    wrong += [f"{k} is not in GPT-2" for k in theirs.keys() - ours.keys()]
    wrong += [f"{k} is {tuple(theirs[k].shape)}, not {tuple(ours[k].shape)}"
              for k in ours.keys() & theirs.keys() if theirs[k].shape != ours[k].shape]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit: {'; '.join(sorted(wrong)[:6])}")
    policy.load_state_dict(conv1d(theirs))


def load_init(name, world):
    """pi_0 from a checkpoint, for --init. Raises InputError where it does not fit this world."""
    policy = GPT.from_pretrained(name)
    vocabulary = Tokenizer.from_pretrained(name).backend.get_vocab()
    require(vocabulary == world.tokenizer.backend.get_vocab(),
            f"{name}: its tokenizer is not that of this data")
    require(policy.config.n_positions >= world.max_prompt + world.max_response,
            f"{name}: {policy.config.n_positions} positions are too few for prompts of "
            f"{world.max_prompt} and responses of {world.max_response} tokens")
    return policy


# ---- the folder of a run ------------------------------------------------------------------------

def provenance(script, argv, settings, device, world):
    """What defines a run, for its config.json: settings, versions, device, number of threads, a
    checksum of the world's texts. Equal ones give equal results, on one machine's CPU bit for bit;
    another CPU or number of threads rounds differently, and from the first other sample runs part.

    argv: the script's flags; None: those of the command line.
    """
    command = shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)])
    data = [value for value in vars(world).values() if isinstance(value, list)]
    return {"command": command, "settings": asdict(settings),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__, "tokenizers": tokenizers.__version__},
            "device": str(device), "threads": torch.get_num_threads(),
            "data": zlib.crc32(repr(data).encode())}


def claim_folder(out, head, resume):
    """The folder `out` as a Path, with this run's head, from provenance(), in its config.json.

    Raises InputError if it holds a run already, unless `resume` goes on with it: then the first
    setting is named that differs from that run's.
    """
    file = make_folder(out) / "config.json"
    if not file.exists() and not any(file.parent.glob("seed*")):
        if resume:
            print(f"nothing to resume in {out}: a new run")
        write_json(file, head)
        return file.parent
    require(resume, f"{out} holds another run: --resume it, or choose another --out")
    try:
        # JSON has no tuples, so the new head is compared as it would be read.
        now, then = ({**h["settings"], **h["versions"], **h}
                     for h in (json.loads(json.dumps(head)), load_json(file)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not a run's settings, cannot be resumed") from error
    for name, value in now.items():
        may_differ = name in ("command", "settings", "versions", "out", "resume")
        require(may_differ or value == then.get(name), f"{out}: cannot be resumed with another "
                f"{name}: it was {then.get(name)}, now {value}")
    return file.parent


class Run:
    """One seed's folder, out/seed{seed}: its finished stages, its random streams, its clock.

    A stage's result is saved when the stage is finished, and --resume loads it. Every stage draws
    from a random stream of its own. What it draws does not depend on the stages before it, so an
    interrupted stage is simply done again, to the same result.
    """

    def __init__(self, out, seed, device, tokenizer):
        self.folder = Path(out) / f"seed{seed}"
        self.seed, self.device, self.tokenizer = seed, device, tokenizer
        self.starts = {}                    # {stage: the clock at its beginning}

    def rng(self, stage):
        """This seed's random.Random of a stage: the same whatever other stages draw."""
        return random.Random(f"{self.seed} {stage}")

    def generator(self, stage):
        return torch.Generator(self.device).manual_seed(self.rng(stage).getrandbits(62))

    def begin(self, says):
        """Print what begins now, "stage: what it does"; it lasts until the next one begins."""
        print(f"  {says}", flush=True)
        self.starts[says.partition(":")[0]] = time.perf_counter()

    def end(self):
        """{stage: seconds} of all stages that began; the last one ends now."""
        clock = [*self.starts.values(), time.perf_counter()]
        return {stage: round(clock[i + 1] - clock[i], 2) for i, stage in enumerate(self.starts)}

    def path(self, name):
        return self.folder / name.replace(" ", "-")

    def load(self, name, Model):
        """The model that a stage saved, on the device; None if the stage has not finished."""
        folder = self.path(name)
        if not (folder / "metrics.jsonl").is_file():
            return None
        return Model.from_pretrained(folder).to(self.device)

    def save(self, name, model, history):
        """Write a stage's model, a folder that transformers opens, and its history, a line for each
        record of metrics.jsonl. That file comes last: where it is, the rest is. Returns the model.
        """
        folder = self.path(name)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        lines = "".join(json.dumps(record) + "\n" for record in history)
        write_aside(folder / "metrics.jsonl", lambda part: part.write_text(lines))
        return model

    def history(self, name):
        """The history that save() wrote; [] if there is none."""
        file = self.path(name) / "metrics.jsonl"
        return [json.loads(line) for line in file.open()] if file.is_file() else []

    def load_json(self, name):
        """The value that save_json(name, value) wrote, or None."""
        return load_json(self.path(f"{name}.json"))

    def save_json(self, name, value):
        """Write a value that JSON can hold; returns it as load_json would, so that a resumed run
        goes on with equal values (JSON has no tuples)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path(f"{name}.json"), value, indent=None)
        return self.load_json(name)
