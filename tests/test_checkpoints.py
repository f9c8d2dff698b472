"""checkpoints.py against transformers, in both directions; what is refused, and that it is named.

The models are tiny and random, every parameter off its default, so that no term is zero by chance.
"""

import json
import pickle
import types

import huggingface_hub
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

import afd
from model import GPT, GPTConfig, collate, generate
from reward import RewardModel
from utils import checkpoints as c
from utils.cli import InputError
from utils.tokenizer import EOS, PAD, UNK, Tokenizer, bpe_tokenizer, word_tokenizer

TEXTS = ["the cat sat on the mat .", "a dog ran at the cat .", "señor — 日本 ☼"]
BPE = bpe_tokenizer(TEXTS, 300)
WORDS = word_tokenizer(["the", "cat", "sat", "."])
STRINGS = [*TEXTS, "", " ", "  two  spaces\n\n\tand\ta tab ", "don't we're 3.14", "\x00\u200b🙂",
           f"the {EOS} cat {PAD}{UNK} .", "zebra the"]
# layers, heads, width, vocabulary, positions: one head, odd sizes, wide, long
SHAPES = [(1, 1, 8, 300, 16), (3, 3, 12, 311, 12), (2, 4, 64, 320, 40), (4, 2, 10, 303, 24)]


def textless(vocab_size):
    """The ids that no text has: padding, and what a vocabulary is padded with beyond BPE's."""
    return (BPE.pad, *range(len(BPE), vocab_size))


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def off_default(model, seed=0, std=0.3):
    """Every parameter moved: biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def ours(shape=SHAPES[1], suppress=(), seed=0):
    layers, heads, width, vocab, positions = shape
    torch.manual_seed(seed)
    return off_default(GPT(GPTConfig(
        vocab, positions, width, layers, heads, suppress_tokens=suppress,
        eos_token_id=BPE.eos, pad_token_id=BPE.pad)), seed)


def save(folder, model, tokenizer):
    """A stage's folder, as a run writes it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(name):
    return GPT.from_pretrained(name), Tokenizer.from_pretrained(name)


def theirs(shape=SHAPES[1], seed=0, **more):
    layers, heads, width, vocab, positions = shape
    torch.manual_seed(seed)
    return off_default(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads,
        bos_token_id=BPE.eos, eos_token_id=BPE.eos, **more)), seed)


def write_theirs(folder, model=None, tokenizer=BPE):
    """A folder as transformers writes it, with a tokenizer beside the model."""
    (theirs() if model is None else model).save_pretrained(folder)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    return folder


def tokens(shape, rows=4, seed=1):
    return torch.randint(shape[3], (rows, shape[4]), generator=torch.Generator().manual_seed(seed))


def same_logits(mine, other, idx):
    with torch.no_grad():
        expected, got = other(idx).logits, mine(idx)
    assert expected.std() > 0.5         # not flat: a wrong weight would show
    finite = got.isfinite()
    torch.testing.assert_close(got[finite], expected[finite], rtol=0, atol=1e-4)
    return finite


def greedy(model, prompt, n, eos):
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids


def same_greedy(mine, other, shape, eos):
    seen = set()
    for prompt in tokens(shape, 6, seed=2)[:, :4].tolist():
        out = other.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=0,
                             max_new_tokens=shape[4] - 4,
                             suppress_tokens=list(mine.config.suppress_tokens) or None)
        assert greedy(mine, prompt, shape[4] - 4, eos) == out[0].tolist()
        seen.add(tuple(out[0, 4:].tolist()))
    assert len(seen) > 1                # the text depends on the prompt


def edit(path, **changes):
    """Change fields of a JSON file; None takes one out."""
    record = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))


# ---- parity with transformers -------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("prefix", [True, False], ids=["lm", "base"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_what_transformers_writes_computes_the_same_here(shape, prefix, file, tmp_path):
    """A failure means that GPT-2's published weights would be read as another model: a transposed
    matrix, a norm's epsilon or a missing bias. With and without "transformer." (GPT2Model saves
    without), and as the older file, in which buffers and the tied head stand too."""
    other = theirs(shape, layer_norm_epsilon=0.02)
    write_theirs(tmp_path, other if prefix else other.transformer)
    if file == "pytorch_model.bin":
        state = other.state_dict() if prefix else other.transformer.state_dict()
        for i in range(shape[0]):
            block = f"{'transformer.' * prefix}h.{i}.attn."
            state |= {block + "bias": torch.ones(1, 1, 9, 9), block + "masked_bias": torch.ones(())}
        torch.save(dict(state), tmp_path / file)
        (tmp_path / "model.safetensors").unlink()
    mine, tokenizer = load(tmp_path)
    assert mine.config.layer_norm_epsilon == 0.02
    assert mine.config.suppress_tokens == textless(shape[3])
    finite = same_logits(mine, other, tokens(shape))
    assert finite.sum() == finite.numel() * (1 - len(textless(shape[3])) / shape[3])
    same_greedy(mine, other, shape, tokenizer.eos)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_written_here_computes_the_same_in_transformers(shape, tmp_path):
    """A failure means that what is trained here is of no use to anyone else. Greedy text must be
    the same though here suppressed tokens have probability zero at every call."""
    mine = ours(shape, suppress=textless(shape[3]))
    save(tmp_path, mine, BPE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"]
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}      # older transformers refuse other files
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(other) is transformers.GPT2LMHeadModel and other.config.attn_pdrop == 0
    assert other.config.eos_token_id == other.config.bos_token_id == BPE.eos
    assert other.generation_config.pad_token_id == BPE.pad
    finite = same_logits(mine, other, tokens(shape))
    assert not finite[..., list(textless(shape[3]))].any()
    assert finite.sum() == finite.numel() * (1 - len(textless(shape[3])) / shape[3])
    same_greedy(mine, other, shape, BPE.eos)
    again = GPT.from_pretrained(tmp_path)
    assert torch.equal(again(tokens(shape)), mine(tokens(shape)))
    assert again.config == mine.config


def test_suppressed_tokens_are_left_out_by_their_generate_too(tmp_path):
    """A failure means that transformers would write padding where pi never does: here every token
    but three is suppressed."""
    shape, few = SHAPES[2], (5, 77, 130)
    mine = ours(shape, suppress=tuple(i for i in range(shape[3]) if i not in few))
    save(tmp_path, mine, BPE)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    same_greedy(mine, other, shape, BPE.eos)
    other.save_pretrained(tmp_path / "again")       # and they survive the way back
    BPE.backend.save(str(tmp_path / "again" / "tokenizer.json"))
    assert GPT.from_pretrained(tmp_path / "again").config == mine.config


def test_there_and_back_again_is_the_same_model(tmp_path):
    """theirs -> ours -> theirs: no tensor changes, not by rounding either."""
    write_theirs(tmp_path / "a")
    save(tmp_path / "b", *load(tmp_path / "a"))
    a, b = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_float32(dtype, tmp_path):
    other = theirs().to(dtype)
    write_theirs(tmp_path, other)
    mine = GPT.from_pretrained(tmp_path)
    assert mine.wte.weight.dtype == torch.float32
    same_logits(mine, other.float(), tokens(SHAPES[1]))


# ---- tokenizers ---------------------------------------------------------------------------------

@pytest.mark.parametrize("tokenizer", [BPE, WORDS], ids=["bpe", "words"])
def test_token_ids_are_those_of_autotokenizer(tokenizer, tmp_path):
    """A failure means that a text would be other tokens outside: also where it spells a special
    token, which is only text in both."""
    save(tmp_path, ours(), tokenizer)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    mine = Tokenizer.from_pretrained(tmp_path)
    for text in STRINGS:
        ids = tokenizer.encode(text)
        assert other(text)["input_ids"] == mine.encode(text) == ids
        assert other.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
        assert mine.decode([*ids, mine.eos]) == tokenizer.decode(ids)
    assert (other.eos_token_id, other.bos_token_id) == (tokenizer.eos, tokenizer.eos)
    assert (other.pad_token_id, other.unk_token_id) == (tokenizer.pad, tokenizer.unk)
    assert other.model_max_length == 12 and len(other) == len(tokenizer)


def gpt2_files(folder, special=(EOS,)):
    """vocab.json and merges.txt as GPT-2's: its <|endoftext|> is the last id, and no padding."""
    folder.mkdir(exist_ok=True)
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(TEXTS, 290, show_progress=False)
    backend.save_model(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab |= {token: len(vocab) + i for i, token in enumerate(special)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    return len(vocab)


def test_vocab_json_and_merges_txt_are_gpt2_s_tokenizer(tmp_path):
    """A failure means that GPT-2's own files are read as another tokenizer than transformers'."""
    size = gpt2_files(tmp_path)
    theirs().save_pretrained(tmp_path)
    mine = Tokenizer.from_pretrained(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(other).__name__.startswith("GPT2")
    assert mine.eos == other.eos_token_id == size - 1
    assert mine.pad is None and mine.unk is None and mine.suppress == () and len(mine) == size
    for text in STRINGS:
        if EOS not in text:             # there that is the end, here only text
            assert mine.encode(text) == other(text)["input_ids"]
            assert mine.decode([*mine.encode(text), mine.eos]) == text
    assert mine.eos not in mine.encode(f"the {EOS} cat")
    save(tmp_path / "again", GPT.from_pretrained(tmp_path), mine)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert [again(text)["input_ids"] for text in STRINGS] == [mine.encode(text) for text in STRINGS]
    assert again.pad_token_id is None and again.eos_token_id == mine.eos


def test_ids_without_a_text_are_never_sampled(tmp_path):
    """A vocabulary that is padded to a round number, padding of the checkpoint's own name, a
    special token: nobody could read what a policy writes with them."""
    backend = tokenizers.Tokenizer.from_str(BPE.backend.to_str())
    backend.add_special_tokens(["[PAD]", "<mask>"])
    write_theirs(tmp_path, theirs((1, 1, 8, len(BPE) + 40, 16)))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    model, tokenizer = load(tmp_path)
    assert tokenizer.pad == model.config.pad_token_id == len(BPE)
    with torch.no_grad():       # nothing else is likely: all of it goes to the end
        model.wte.weight[list(textless(len(BPE) + 40))] *= 100
    responses = generate(model, [[5, 6]] * 9, 40, generator=torch.Generator().manual_seed(0))
    written = {i for row in responses for ids in row for i in ids}
    assert len(written) > 5 and not written & {*textless(len(BPE) + 40)}
    save(tmp_path / "again", model, tokenizer)
    assert load(tmp_path / "again")[0].config == model.config
    assert Tokenizer.from_pretrained(tmp_path / "again").pad == tokenizer.pad


def test_added_tokens_have_their_ids(tmp_path):
    """Against transformers. Else a text with such a token is read as other ids than it was trained
    on; and where the ids leave a gap, or are another token's, it is refused."""
    size = gpt2_files(tmp_path)
    theirs((1, 1, 8, size + 4, 16)).save_pretrained(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": size + 1, "<tool>": size}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "GPT2Tokenizer", "additional_special_tokens": ["<b>"]}))
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model, mine = load(tmp_path)
    ids = mine.encode("the <tool> cat")
    assert size in ids and ids == other("the <tool> cat")["input_ids"]
    assert mine.decode(ids) == "the <tool> cat"
    assert model.config.suppress_tokens == (size + 1, size + 2, size + 3)      # <b> is special
    (tmp_path / "added_tokens.json").unlink()
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder={str(size): {
        "content": "<tool>", "lstrip": False, "rstrip": False, "single_word": False,
        "normalized": False, "special": False}})
    assert Tokenizer.from_pretrained(tmp_path).encode("the <tool> cat") == ids
    for wrong in ({"<gap>": size + 7}, {"a": size + 1}):
        (tmp_path / "added_tokens.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="cannot have the id"):
            Tokenizer.from_pretrained(tmp_path)


def test_a_space_before_each_text_is_refused(tmp_path):
    """An answer would get one more space than its demonstration has. Both places of the flag."""
    size = gpt2_files(tmp_path)
    theirs((1, 1, 8, size, 16)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    with pytest.raises(InputError, match="add_prefix_space"):
        load(tmp_path)
    edit(tmp_path / "tokenizer_config.json", add_prefix_space=False)
    load(tmp_path)
    backend = tokenizers.Tokenizer.from_str(BPE.backend.to_str())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="add_prefix_space"):
        load(tmp_path)


def test_a_tokenizer_that_pads_cuts_or_adds_is_only_a_tokenizer(tmp_path):
    """Many files on the hub carry a length to cut to and padding for their own training: with them
    texts would be cut without a word."""
    backend = tokenizers.Tokenizer.from_str(BPE.backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{EOS} $0", special_tokens=[(EOS, BPE.eos)])
    write_theirs(tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))
    mine = Tokenizer.from_pretrained(tmp_path)
    assert [mine.encode(text) for text in STRINGS] == [BPE.encode(text) for text in STRINGS]
    assert Tokenizer.from_pretrained(tmp_path).encode("the cat") == BPE.encode("the cat")
    assert mine.encode_documents(TEXTS, 8) == BPE.encode_documents(TEXTS, 8)


# ---- what is refused ----------------------------------------------------------------------------

def tensors_of(folder, change):
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})


H = "transformer.h.0."
FIELDS = {
    "model_type": "gpt_neo", "activation_function": "relu", "n_inner": 47,
    "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
    "add_cross_attention": True, "tie_word_embeddings": False, "vocab_size": "many", "n_layer": 0,
    "n_head": 5, "n_positions": 1.5}
TENSORS = {
    "ln_f.bias is missing": lambda s: s.pop("transformer.ln_f.bias"),
    "h.0.attn.c_attn.bias is missing": lambda s: s.pop(H + "attn.c_attn.bias"),
    "multiple_choice_head.weight is not in GPT-2":
        lambda s: s.update({"multiple_choice_head.weight": torch.zeros(2)}),
    "h.0.attn.q_attn.weight is not in GPT-2":
        lambda s: s.update({H + "attn.q_attn.weight": torch.zeros(2, 2)}),
    r"wpe.weight is \(4, 12\), not \(12, 12\)":
        lambda s: s.update({"transformer.wpe.weight": torch.zeros(4, 12)}),
    r"h.0.mlp.c_fc.weight is \(48, 12\), not \(12, 48\)":      # nn.Linear's layout
        lambda s: s.update({H + "mlp.c_fc.weight": torch.zeros(48, 12)}),
    r"h.0.ln_1.weight is \(\), not \(12,\)":
        lambda s: s.update({H + "ln_1.weight": torch.tensor(1.0)}),
    "wte.weight is missing": lambda s: s.pop("transformer.wte.weight"),
    "lm_head.weight": lambda s: s.update({"lm_head.weight": 1 + s["transformer.wte.weight"]}),
}


@pytest.mark.parametrize("field, value, message", [
    *((field, value, field) for field, value in FIELDS.items()),
    *((field, None, f"{field} is None") for field in (
        "vocab_size", "n_positions", "n_embd", "n_layer", "n_head"))])
def test_a_config_that_is_not_computed_here_is_refused_by_its_field(field, value, message,
                                                                    tmp_path):
    """A failure means that another architecture is read as GPT-2, and writes nonsense; or that a
    default of ours stands in for a size that the file does not have."""
    write_theirs(tmp_path)
    edit(tmp_path / "config.json", **{field: value})
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_the_same_computation_under_another_name_is_not_refused(tmp_path):
    other = theirs()
    write_theirs(tmp_path, other)
    edit(tmp_path / "config.json", activation_function="gelu_pytorch_tanh", n_inner=48,
         tie_word_embeddings=None, n_ctx=None, reorder_and_upcast_attn=True, architectures=None)
    tensors_of(tmp_path, lambda s: s.update(
        {"lm_head.weight": s["transformer.wte.weight"].clone()}))
    same_logits(GPT.from_pretrained(tmp_path), other, tokens(SHAPES[1]))


def test_a_head_alone_is_the_embedding_too(tmp_path):
    """Of two tied tensors some programs keep the head only: it is the same model."""
    tensors_of(write_theirs(tmp_path, other := theirs()), lambda s: s.update(
        {"lm_head.weight": s.pop("transformer.wte.weight")}))
    same_logits(GPT.from_pretrained(tmp_path), other, tokens(SHAPES[1]))


@pytest.mark.parametrize("named", TENSORS)
def test_a_tensor_that_does_not_fit_is_named(named, tmp_path):
    """A failure means that part of a model stays random, or that a user must guess which."""
    tensors_of(write_theirs(tmp_path), TENSORS[named])
    with pytest.raises(InputError, match=named) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_vocabulary_larger_than_the_model_s_is_refused(tmp_path):
    """By ids, not by their number: an id beyond the embedding would fail in the middle of a run."""
    write_theirs(tmp_path, theirs((1, 1, 8, len(BPE) - 1, 16)))
    with pytest.raises(InputError, match=f"{len(BPE) - 1}.*vocab_size"):
        load(tmp_path)
    write_theirs(tmp_path, theirs((1, 1, 8, len(BPE), 16)))
    load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    size = gpt2_files(tmp_path)
    assert size < 300
    edit(tmp_path / "vocab.json", **{EOS: 900})
    with pytest.raises(InputError, match="900.*vocab_size"):
        load(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    """A failure means that an end is made up, with an embedding that means something else."""
    theirs().save_pretrained(tmp_path)
    gpt2_files(tmp_path, special=())
    with pytest.raises(InputError, match="endoftext"):
        load(tmp_path)


def older_file(folder, value, write=torch.save):
    (folder / "model.safetensors").unlink()
    write(value, folder / "pytorch_model.bin")


DAMAGE = {
    "config.json is missing": lambda d: (d / "config.json").unlink(),
    "model.safetensors or pytorch_model.bin is missing":
        lambda d: (d / "model.safetensors").unlink(),
    "tokenizer.json or vocab.json is missing": lambda d: (d / "tokenizer.json").unlink(),
    "merges.txt is missing": lambda d: (d / "tokenizer.json").rename(d / "vocab.json"),
    "garbage weights": lambda d: (d / "model.safetensors").write_bytes(b"garbage\n" * 9),
    "empty weights": lambda d: (d / "model.safetensors").write_bytes(b""),
    "cut weights": lambda d: (d / "model.safetensors").write_bytes(
        (d / "model.safetensors").read_bytes()[:-100]),
    "garbage in the older file": lambda d: older_file(
        d, b"garbage\n" * 9, lambda value, f: f.write_bytes(value)),
    "a tensor alone": lambda d: older_file(d, torch.zeros(3)),
    "no tensors": lambda d: older_file(d, {"x": 1}),
    "config is a list": lambda d: (d / "config.json").write_text("[]"),
    "config is no JSON": lambda d: (d / "config.json").write_text("{\n\n"),
    "another depth": lambda d: edit(d / "config.json", n_layer=4),
    "another width": lambda d: edit(d / "config.json", n_embd=24, n_inner=None),
    "suppresses what it has not": lambda d: edit(d / "generation_config.json",
                                                 suppress_tokens=[9999]),
    "garbage tokenizer": lambda d: (d / "tokenizer.json").write_text("{}"),
    "binary tokenizer": lambda d: (d / "tokenizer.json").write_bytes(b"\xff\x00"),
    "vocab_size": lambda d: edit(d / "config.json", vocab_size=9),
    **{f"{name}: a git-lfs pointer": lambda d, name=name: (d / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 497933648\n")
       for name in ("model.safetensors", "tokenizer.json", "config.json")},
    "empty tokenizer": lambda d: (d / "tokenizer.json").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_one_line_that_names_the_folder(damage, tmp_path):
    """A failure means that a user who names the wrong folder sees a traceback, or, worse, that a
    model comes out which is not the one that was saved."""
    save(tmp_path / "run", ours(suppress=BPE.suppress), BPE)
    DAMAGE[damage](tmp_path / "run")
    with pytest.raises(InputError) as error:
        load(tmp_path / "run")
    message = str(error.value)
    assert message.startswith(str(tmp_path / "run")) and "\n" not in message
    assert damage in message or not damage.endswith(("missing", "pointer"))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("write", [torch.save, lambda x, f: f.write_bytes(
    pickle.dumps(x, protocol=2))], ids=["torch", "pickle"])
def test_weights_cannot_run_code(write, tmp_path):
    """A failure means that loading a downloaded checkpoint runs whatever its author put there."""
    save(tmp_path / "run", RewardModel(ours()), BPE)
    payload = {"x": Payload(str(tmp_path / "ran"))}
    write(payload, tmp_path / "run" / "reward_head.pt")
    with pytest.raises(ValueError):
        RewardModel.from_pretrained(tmp_path / "run")
    older_file(tmp_path / "run", payload, write)
    with pytest.raises(InputError):
        GPT.from_pretrained(tmp_path / "run", trunk=True)
    assert not (tmp_path / "ran").exists()


# ---- reward models ------------------------------------------------------------------------------

@pytest.mark.parametrize("head", ["sum", "last"])
def test_a_reward_model_comes_back(head, tmp_path):
    """A failure means that a trained reward model cannot be used after its run."""
    torch.manual_seed(0)
    reward = RewardModel(ours(suppress=textless(311)), head)
    torch.nn.init.normal_(reward.score.weight)
    torch.nn.init.normal_(reward.score.bias)
    save(tmp_path, reward, BPE)
    again = RewardModel.from_pretrained(tmp_path)
    batch = collate([([5, 6], [7, 8, 1]), ([5], [9, 1])])
    assert again.head == head and again.trunk.config == reward.trunk.config
    assert torch.equal(again(batch), reward(batch)) and reward(batch).abs().min() > 0.01
    assert torch.equal(GPT.from_pretrained(tmp_path, trunk=True).wte.weight,
                       reward.trunk.wte.weight)     # its trunk is a checkpoint like any other
    with pytest.raises(InputError, match="a reward model, not a policy"):
        GPT.from_pretrained(tmp_path)               # what it would write has no sense
    (tmp_path / "reward_head.pt").unlink()
    with pytest.raises(ValueError, match="no reward model in it"):
        RewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_parts_are_read_as_one(kind, tmp_path):
    """As transformers cuts up what is large, or cut up by hand; a part that is missing is named."""
    other = theirs()
    other.save_pretrained(tmp_path, max_shard_size="10KB")
    BPE.backend.save(str(tmp_path / "tokenizer.json"))
    parts = sorted(tmp_path.glob("model-*"))
    assert len(parts) > 2 and not (tmp_path / "model.safetensors").exists()
    if kind == "bin":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        names = {path.name: path.name.replace("model", "pytorch_model").replace(
            "safetensors", "bin") for path in parts}
        for path in parts:
            torch.save(safetensors.torch.load_file(path), tmp_path / names[path.name])
            path.unlink()
        (tmp_path / "model.safetensors.index.json").unlink()
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(
            {"weight_map": {key: names[name] for key, name in index["weight_map"].items()}}))
        parts = [tmp_path / name for name in names.values()]
    same_logits(GPT.from_pretrained(tmp_path), other, tokens(SHAPES[1]))
    parts[1].unlink()
    with pytest.raises(InputError, match=f"{parts[1].name} is missing"):
        GPT.from_pretrained(tmp_path)


def test_the_end_of_a_text_is_the_checkpoint_s_own(tmp_path):
    """Of a model that ends with another token than GPT-2's: else it would be trained to end with
    one that no reader of the checkpoint takes for an end. Written and read again it stays."""
    backend = tokenizers.Tokenizer.from_str(BPE.backend.to_str())
    backend.add_special_tokens(["<end>"])
    end = backend.token_to_id("<end>")
    save(tmp_path / "a", ours((1, 1, 8, 320, 16)), BPE)
    backend.save(str(tmp_path / "a" / "tokenizer.json"))
    for ids in (end, [5, end]):         # 5 is a word
        edit(tmp_path / "a" / "generation_config.json", eos_token_id=ids)
        model, tokenizer = load(tmp_path / "a")
        assert model.config.eos_token_id == tokenizer.eos == end
        assert tokenizer.decode(tokenizer.encode("cat") + [end]) == "cat"
    assert end not in tokenizer.encode("a <end> in a text")
    save(tmp_path / "b", model, tokenizer)
    assert Tokenizer.from_pretrained(tmp_path / "b").eos == end
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "b").eos_token == "<end>"
    edit(tmp_path / "a" / "generation_config.json", eos_token_id=[])
    assert Tokenizer.from_pretrained(tmp_path / "a").eos == BPE.eos
    edit(tmp_path / "a" / "generation_config.json", eos_token_id=None)
    edit(tmp_path / "a" / "config.json", eos_token_id=end)
    assert Tokenizer.from_pretrained(tmp_path / "a").eos == end
    edit(tmp_path / "a" / "config.json", eos_token_id=50256)        # transformers' default
    for token in ("<end>", {"content": "<end>"}):       # named by the tokenizer alone
        edit(tmp_path / "a" / "tokenizer_config.json", eos_token=token)
        model, tokenizer = load(tmp_path / "a")
        assert model.config.eos_token_id == tokenizer.eos == end
    edit(tmp_path / "a" / "tokenizer_config.json", eos_token="<gone>")
    with pytest.raises(InputError, match="no <gone> token"):
        load(tmp_path / "a")
    edit(tmp_path / "a" / "tokenizer_config.json", eos_token=EOS)
    model, tokenizer = load(tmp_path / "a")
    assert model.config.eos_token_id == tokenizer.eos == BPE.eos
    (tmp_path / "a" / "tokenizer.json").unlink()        # without one the model's own is taken
    assert GPT.from_pretrained(tmp_path / "a").config.eos_token_id is None
    edit(tmp_path / "a" / "config.json", eos_token_id=[50256, 7])
    assert GPT.from_pretrained(tmp_path / "a").config.eos_token_id == 7


# ---- names on the hub ---------------------------------------------------------------------------

@pytest.mark.parametrize("has", c.WEIGHTS)
def test_a_name_is_fetched_from_the_hub(has, tmp_path, monkeypatch):
    """A failure means that both files of weights are fetched, which is twice the bytes, or files
    that nothing reads; GPT-2's folder on the hub holds a dozen forms of its weights."""
    save(tmp_path / "hub", ours(), BPE)
    if has == "pytorch_model.bin":
        path = tmp_path / "hub" / "model.safetensors"
        older_file(tmp_path / "hub", safetensors.torch.load_file(path))
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, [p for p in allow_patterns if p.startswith(("model", "pytorch"))]))
        assert {"config.json", "tokenizer.json", "vocab.json", "merges.txt",
                "generation_config.json", "reward_head.pt"} <= {*allow_patterns}
        return str(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(GPT.from_pretrained("someone/gpt2").wte.weight, ours().wte.weight)
    files = {"model.safetensors": "model-*-of-*.safetensors",
             "pytorch_model.bin": "pytorch_model-*-of-*.bin"}
    assert asked == [("someone/gpt2", [file, f"{file}.index.json", files[file]])
                     for file in list(files)[:list(files).index(has) + 1]]
    assert Tokenizer.from_pretrained("someone/gpt2").eos == BPE.eos


def test_a_folder_is_never_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked"))
    save(tmp_path / "gpt2", ours(), BPE)
    monkeypatch.chdir(tmp_path)
    load("gpt2")


@pytest.mark.parametrize("Model", [GPT, Tokenizer])
def test_without_a_network_a_name_is_one_line_that_says_what_was_tried(Model, tmp_path,
                                                                       monkeypatch):
    """The real library, switched off line by conftest.py."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        Model.from_pretrained("nobody/no-such-model")
    message = str(error.value)
    assert message.startswith("nobody/no-such-model: cannot be loaded: no such folder")
    assert "Hugging Face hub" in message and "\n" not in message


# ---- --init -------------------------------------------------------------------------------------

@pytest.fixture
def demos(tmp_path):
    rows = [{"prompt": f"the cat {i}?", "response": f"it sat {i} — señor"} for i in range(30)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "d.jsonl")


def gpt2_folder(folder, positions=64):
    """As GPT-2 comes: vocab.json and merges.txt, no padding, <|endoftext|> last."""
    size = gpt2_files(folder)
    theirs((1, 2, 8, size, positions)).save_pretrained(folder)
    return str(folder)


def test_own_data_with_init_has_the_checkpoint_s_model_and_tokenizer(demos, tmp_path, capsys,
                                                                     monkeypatch):
    """A failure means that GPT-2 is given another tokenizer's ids, or a random model trained in its
    place. The whole line runs on a checkpoint without padding or unknown word, and transformers
    opens what it wrote, with the trained logits. The checkpoint is read once."""
    init, read = gpt2_folder(tmp_path / "gpt2"), []
    monkeypatch.setattr(afd, "load_init", lambda *args: read.append(args) or c.load_init(*args))
    results = afd.main([
        "--demos", demos, "--init", init, "--out", str(tmp_path / "o"), "--device", "cpu",
        "--n-samples", "20", "--n-candidates", "4", "--max-prompt", "40", "--max-response", "20",
        "--methods", "po init-sft 0.3,closed-form log-ratio 0.3,spin", "--policy-steps", "1"])
    assert "pretrain" not in capsys.readouterr().out and len(read) == 1
    assert {"policy optimisation, init-sft 0.3", "closed form, log-ratio 0.3", "spin"} <= {
        row["name"] for row in results["rows"]}
    pi0, tokenizer = load(init)
    sft = GPT.from_pretrained(tmp_path / "o" / "seed0" / "sft")
    assert sft.config == pi0.config and tokenizer.pad is None
    # Fine-tuning moves weights by little: a random model would be further away.
    assert 0 < (sft.wte.weight - pi0.wte.weight).abs().max() < 0.1 * pi0.wte.weight.std()
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o" / "seed0" / "sft")
    same_logits(sft, other, tokens((1, 2, 8, sft.config.vocab_size, 64)))
    rewritten = transformers.AutoTokenizer.from_pretrained(tmp_path / "o" / "seed0" / "sft")
    assert rewritten("señor 3")["input_ids"] == tokenizer.encode("señor 3")


def test_an_init_that_does_not_fit_is_refused(demos, tmp_path):
    init = gpt2_folder(tmp_path / "gpt2", positions=59)
    argv = ["--init", init, "--out", str(tmp_path / "o")]
    room = ["--demos", demos, "--max-prompt", "40", "--max-response", "20"]
    for more, message in (
            (room, "59 positions are too few for prompts of 40 and responses of 20"),
            ([], "tokenizer is not that of this data"),
            ([*room, "--corpus", demos], "--corpus")):
        with pytest.raises(InputError, match=message):
            afd.main([*argv, *more])
    assert not (tmp_path / "o").exists()


def test_a_built_in_task_takes_back_what_its_own_run_wrote(tmp_path):
    """Only with the task's tokenizer: the ids of another would be other words."""
    world = types.SimpleNamespace(tokenizer=WORDS, max_prompt=6, max_response=6)
    save(tmp_path / "same", ours(), WORDS)
    assert torch.equal(c.load_init(tmp_path / "same", world).wte.weight, ours().wte.weight)
    save(tmp_path / "other", ours(), word_tokenizer(["cat", "the", "sat", "."]))
    with pytest.raises(InputError, match="not that of this data"):
        c.load_init(tmp_path / "other", world)


def test_a_checkpoint_without_padding_is_sampled_like_any(tmp_path):
    """PAD is not EOS and GPT-2 has no PAD: responses end at <|endoftext|>, rows of other lengths
    are padded with an id that means something else, and nothing of it shows."""
    mine, tokenizer = load(gpt2_folder(tmp_path / "gpt2"))
    prompts = [tokenizer.encode(text) for text in ("the cat", "a dog ran at the cat", "☼")]
    together = generate(mine, prompts, 40, max_new_tokens=20,
                        generator=torch.Generator().manual_seed(0))
    lengths = {len(ids) for responses in together for ids in responses}
    assert len(lengths) > 3
    for responses in together:
        for ids in responses:
            assert tokenizer.eos not in ids[:-1] and (len(ids) == 20 or ids[-1] == tokenizer.eos)
