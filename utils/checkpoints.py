"""Checkpoints in the format of transformers' GPT-2: a folder, or a name on the Hugging Face hub.

    config.json, generation_config.json         shape of the model; tokens that it never writes
    model.safetensors or pytorch_model.bin      tensors, under GPT-2's names, "transformer." or not;
                                                or the parts that a .index.json names
    tokenizer.json, or vocab.json + merges.txt  the tokenizer; eos_token_id is its end of a text

AutoModelForCausalLM and AutoTokenizer open what is written here, with equal logits and token ids.
Files are data: only tensors are read from them, never code. What GPT cannot compute is refused by
name. A reward model's folder holds its trunk as such a checkpoint and its head beside it.
"""

import importlib.util
import json
import zlib
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import tokenizers
import torch

from model import (EOS, GPT, PAD, UNK, GPTConfig, InputError, Tokenizer, byte_level, write_aside,
                   write_json)
from reward import RewardModel

# Fields of config.json and the values with which GPT computes the same; the first if it is absent.
COMPUTED = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,), "tie_word_embeddings": (True,)}
# What is read beside the weights, where it is there.
TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt")


def save_pretrained(folder, model, tokenizer, **extra):
    """Write a folder that transformers opens too: config.json (with `extra`), the weights and the
    tokenizer; each file aside first, then renamed.

    There suppressed tokens have finite logits, and it is generate() that leaves them out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**{field: known[0] for field, known in COMPUTED.items()}, **asdict(model.config),
              "architectures": ["GPT2LMHeadModel"], "n_ctx": model.config.n_positions,
              "n_inner": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos,
           "pad_token_id": tokenizer.pad}
    write_json(folder / "generation_config.json",
               {**ids, "suppress_tokens": config.pop("suppress_tokens") or None})
    write_json(folder / "config.json", {**config, **ids, **extra})
    eos = tokenizer.backend.id_to_token(tokenizer.eos)
    names = {"bos_token": eos, "eos_token": eos, "pad_token": PAD, "unk_token": UNK}
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.n_positions,
        "split_special_tokens": True, "clean_up_tokenization_spaces": False,    # as Tokenizer does
        **{k: t for k, t in names.items() if tokenizer.backend.token_to_id(t) is not None}})
    write_aside(folder / "tokenizer.json", lambda f: tokenizer.backend.save(str(f)))
    tensors = {f"transformer.{name}": tensor.contiguous()
               for name, tensor in conv1d(model.state_dict()).items()}
    name, stale = weight_files()
    if name == "model.safetensors":
        from safetensors.torch import save_file
        write_aside(folder / name, lambda f: save_file(tensors, f, metadata={"format": "pt"}))
    else:
        write_aside(folder / name, lambda f: torch.save(tensors, f))
    (folder / stale).unlink(missing_ok=True)


def conv1d(tensors):
    """From GPT-2's layout of weights, (in, out), to that of nn.Linear, (out, in), or back."""
    layers = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {k: t.transpose(0, -1) if k.endswith(layers) else t for k, t in tensors.items()}


def weight_files():
    """Names of weights files, preferred first: without the extra safetensors, pytorch_model.bin."""
    names = ("pytorch_model.bin", "model.safetensors")
    return names[::-1] if importlib.util.find_spec("safetensors") else names


@contextmanager
def loading(name):
    """The folder `name`, or else the hub's checkpoint of that name, fetched to the hub's cache.
    Whatever goes wrong while it is read is an InputError of one line.
    """
    try:
        folder = Path(name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download      # tokenizers brings it along
            for weights in weight_files():      # the second only where the first is not to be had
                stem, _, kind = weights.partition(".")
                folder = Path(snapshot_download(name, allow_patterns=[
                    *TEXTS, weights, f"{weights}.index.json", f"{stem}-*-of-*.{kind}"]))
                if (folder / weights).is_file() or (folder / f"{weights}.index.json").is_file():
                    break
        yield folder
    except Exception as error:      # each loader has its own kinds of error for a foreign file
        tried = "" if Path(name).is_dir() else "no such folder; as a name on the Hugging Face hub: "
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{name}: cannot be loaded: {tried}{reason}") from error


def first_of(folder, *names):
    """The path of the first of these files that is there. Raises ValueError if none is."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{' or '.join(names)} is missing")


def weights_of(folder):
    """The files of a checkpoint's weights: one, or the parts that an index names. Raises ValueError
    if there are none."""
    for name in weight_files():
        index = folder / f"{name}.index.json"
        if index.is_file() and not (folder / name).is_file():
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [first_of(folder, part) for part in sorted({*parts})]
    return [first_of(folder, *weight_files())]


def checksum(name):
    """A number that tells apart what load_pretrained(name) reads: a name may come to hold other
    weights. Raises InputError."""
    found = 0
    with loading(name) as folder:
        texts = [folder / text for text in TEXTS if (folder / text).is_file()]
        for path in (*texts, *weights_of(folder)):
            with open(path, "rb") as file:
                while block := file.read(2 ** 24):
                    found = zlib.crc32(block, found)
    return found


def load_tokenizer(name):
    """The Tokenizer of a checkpoint: tokenizer.json, or vocab.json and merges.txt."""
    with loading(name) as folder:
        file = first_of(folder, "tokenizer.json", "vocab.json")
        if file.name == "tokenizer.json":
            backend = tokenizers.Tokenizer.from_file(str(file))
        else:
            merges = first_of(folder, "merges.txt")
            backend = byte_level(tokenizers.models.BPE.from_file(str(file), str(merges)))
        return Tokenizer(backend, end_token(folder, backend))


def end_token(folder, backend):
    """The token that ends a text: that of eos_token_id, if it is one added to the vocabulary's
    words, or else EOS."""
    added = backend.get_added_tokens_decoder()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            for i in ids if isinstance(ids, list) else [ids]:
                if i in added:
                    return added[i].content
    return EOS


def read_config(folder):
    """(GPTConfig, config.json). Raises ValueError naming a field with which GPT cannot compute."""
    raw = json.loads(first_of(folder, "config.json").read_text(encoding="utf-8"))
    for field, known in {**COMPUTED, "n_inner": (None, 4 * raw.get("n_embd", 0))}.items():
        if raw.get(field, known[0]) not in known:
            raise ValueError(f"{field} is {raw[field]!r}, not {' or '.join(map(repr, known))}")
    for field in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        if not isinstance(raw.get(field), int) or raw[field] < 1:
            raise ValueError(f"{field} is {raw.get(field)!r}, not a positive whole number")
    if raw["n_embd"] % raw["n_head"]:
        raise ValueError(f"n_embd {raw['n_embd']} is not a multiple of n_head {raw['n_head']}")
    config = GPTConfig(**{f.name: raw[f.name] for f in fields(GPTConfig) if f.name in raw})
    if (folder / "generation_config.json").is_file():
        written = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        config.suppress_tokens = tuple(written.get("suppress_tokens") or ())
    return config, raw


def read_weights(paths, model):
    """Fill model from weights files: only tensors are read, never code. Raises ValueError naming
    tensors that are missing, unknown or misshapen, shapes as in the files.
    """
    raw = {}
    for path in paths:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            raw.update(load_file(path))
        else:
            raw.update(torch.load(path, map_location="cpu", weights_only=True))
    mask = (".attn.bias", ".attn.masked_bias")      # buffers, not parameters
    theirs = {k.removeprefix("transformer."): t for k, t in raw.items() if not k.endswith(mask)}
    head, ours = theirs.pop("lm_head.weight", None), conv1d(model.state_dict())
    if head is not None and not torch.equal(head, theirs.get("wte.weight", head)):
        raise ValueError("lm_head.weight is not wte.weight: untied heads are not computed here")
    wrong = [f"{k} is missing" for k in ours.keys() - theirs.keys()]
    wrong += [f"{k} is not in GPT-2" for k in theirs.keys() - ours.keys()]
    wrong += [f"{k} is {tuple(theirs[k].shape)}, not {tuple(ours[k].shape)}"
              for k in ours.keys() & theirs.keys() if theirs[k].shape != ours[k].shape]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit: {'; '.join(sorted(wrong)[:6])}")
    model.load_state_dict(conv1d(theirs))


def load_pretrained(name, trunk=True):
    """(GPT, Tokenizer, config.json as a dict) of a checkpoint folder or of a name on the hub.

    trunk: a reward model's will do, which is no policy. Raises InputError naming what is missing or
    does not fit.
    """
    with loading(name) as folder:
        if (folder / "reward_head.pt").is_file() and not trunk:
            raise ValueError("a reward model, not a policy")
        config, raw = read_config(folder)
        model = GPT(config)
        read_weights(weights_of(folder), model)
    tokenizer = load_tokenizer(folder)
    largest = max(tokenizer.backend.get_vocab().values())
    if largest >= config.vocab_size:
        raise InputError(f"{name}: the tokenizer has ids up to {largest}, but vocab_size is "
                         f"{config.vocab_size}")
    return model, tokenizer, raw


def load_init(name, world):
    """pi_0 from a checkpoint. Raises InputError where it does not fit this world."""
    init, tokenizer, _ = load_pretrained(name, trunk=False)
    if tokenizer.backend.get_vocab() != world.tokenizer.backend.get_vocab():
        raise InputError(f"{name}: its tokenizer is not that of this data")
    if init.config.n_positions < world.max_prompt + world.max_response:
        raise InputError(f"{name}: {init.config.n_positions} positions are too few for prompts of "
                         f"{world.max_prompt} and responses of {world.max_response} tokens")
    return init


def save_reward(folder, reward, tokenizer):
    """A reward model's folder: its trunk as a checkpoint, and reward_head.pt beside it."""
    save_pretrained(folder, reward.trunk, tokenizer)
    score = {name: part.clone() for name, part in reward.score.state_dict().items()}
    state = {"head": reward.head, "score": score}       # a part of a tensor is saved as all of it
    write_aside(Path(folder) / "reward_head.pt", lambda f: torch.save(state, f))


def load_reward(name):
    """(RewardModel, Tokenizer) of a folder that save_reward wrote. Raises InputError."""
    trunk, tokenizer, _ = load_pretrained(name)
    with loading(name) as folder:
        state = torch.load(first_of(folder, "reward_head.pt"), map_location="cpu",
                           weights_only=True)
        reward = RewardModel(trunk, state["head"])
        reward.score.load_state_dict(state["score"])
    return reward, tokenizer
