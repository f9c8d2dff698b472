"""Tokenizers turn text into token ids and back: words for the toy tasks, byte-level BPE for others.

A tokenizer knows which token ends a text (eos) and which ones no policy may write (suppress). Its
files are those of the `tokenizers` library, which transformers' AutoTokenizer opens too.
"""

import re
from pathlib import Path

import tokenizers

from utils.cli import load_json, require, write_aside, write_json

PAD, EOS, UNK = "<|pad|>", "<|endoftext|>", "<|unk|>"
TURN = "\n\nAssistant:"     # In HH-RLHF's dialogue strings the response follows the last one.
LONG_WORD = 1000            # characters


def meet(prompt, answer=""):
    """(prompt, answer) as every learner reads them, the one right after the other.

    White space is data: where one of the two has some at the seam, the text is theirs as it stands.
    A newline there belongs to the prompt and a single space to the answer, as GPT-2's tokens begin
    with their space. Where neither has any, "\\n\\nAssistant:" gets a space and all else a newline.
    An answer that is indented, by two spaces or a tab, begins on a line of its own.
    """
    if prompt.endswith(TURN):
        return prompt, " " + answer if answer[:1].strip() else answer
    if re.search(r"\S $", prompt) and not answer[:1].isspace():
        return prompt[:-1], " " + answer
    if not prompt or prompt[-1].isspace() or re.match(r" \S", answer):
        return prompt, answer
    return prompt + "\n", answer.removeprefix("\n")


class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids a policy needs: eos, and pad and unk if it has them.

    Raises InputError if the backend has no token `eos`.
    """

    def __init__(self, backend, eos=EOS, pad=PAD, unk=UNK):
        self.backend = backend
        # A text may quote "<|endoftext|>", as a page on language models does: there it is text.
        backend.encode_special_tokens = True
        self.eos, self.pad, self.unk = map(backend.token_to_id, (eos, pad, unk))
        require(self.eos is not None, f"the tokenizer has no {eos} token")
        # Decoding leaves out special tokens, so the end of a text is made one.
        backend.add_special_tokens([eos])
        # Many published files pad or cut texts, for a training of their own.
        backend.no_padding()
        backend.no_truncation()

    def __len__(self):
        return self.backend.get_vocab_size()

    @property
    def suppress(self):
        """Ids that no policy may write: padding, the unknown word and all other special tokens but
        the end. They have no text: decoding leaves them out, and no text is encoded to them."""
        special = {i for i, token in self.backend.get_added_tokens_decoder().items()
                   if token.special} | {self.pad, self.unk}
        return tuple(sorted(special - {self.eos, None}))

    def encode(self, text):
        """The text's token ids, without an end."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, prompt):
        """The token ids after which a policy is to write its answer."""
        return self.encode(meet(prompt)[0])

    def decode(self, ids):
        """The text of token ids; special tokens are left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def truncate_left(self, text, n):
        """The end of a text: as much of it as n tokens hold, from a token's beginning on."""
        while len(found := self.backend.encode(text, add_special_tokens=False)) > n:
            # The rest alone may become one token more than before: then the loop cuts again.
            text = text[max(1, found.offsets[-n][0]):]
        return text

    def encode_pair(self, prompt, response, max_prompt, max_response):
        """(prompt ids, response ids + EOS) of two texts, joined as meet() says.

        Of a prompt longer than max_prompt tokens only the end is used: it is nearest the response.
        A response longer than max_response is cut there and then has no EOS: it is not finished.
        """
        prompt, response = meet(prompt, response)
        response_ids = self.encode(response) + [self.eos]
        return self.encode(self.truncate_left(prompt, max_prompt)), response_ids[:max_response]

    def encode_documents(self, texts, n_positions):
        """Documents as responses to the empty prompt, in pieces of at most n_positions tokens."""
        pieces = []
        for encoding in self.backend.encode_batch(texts, add_special_tokens=False):
            ids = [*encoding.ids, self.eos]
            pieces += [([], ids[i:i + n_positions]) for i in range(0, len(ids), n_positions)]
        return [piece for piece in pieces if len(piece[1]) > 1]     # one token predicts nothing

    @classmethod
    def from_pretrained(cls, name):
        """The tokenizer of a folder, or of that name on the Hugging Face hub.

        Its files are tokenizer.json, or vocab.json and merges.txt, as GPT-2's, and beside them
        tokenizer_config.json and added_tokens.json. A text ends with the token of eos_token_id if
        that is a special one, or else with the eos_token of tokenizer_config.json, or with EOS.
        Raises InputError, also for a tokenizer that puts a space before each text.
        """
        from utils.checkpoints import end_ids, first_of, loading
        with loading(name) as folder:
            file = first_of(folder, "tokenizer.json", "vocab.json")
            if file.name == "tokenizer.json":
                backend = tokenizers.Tokenizer.from_file(str(file))
            else:
                merges = first_of(folder, "merges.txt")
                backend = byte_level(tokenizers.models.BPE.from_file(str(file), str(merges)))
            config = {key: value for name in ("special_tokens_map.json", "tokenizer_config.json")
                      for key, value in (load_json(folder / name) or {}).items()}
            eos, pad, unk = (token_text(config.get(f"{role}_token"))
                             for role in ("eos", "pad", "unk"))
            add_tokens(backend, config, load_json(folder / "added_tokens.json") or {})
            pre = backend.pre_tokenizer
            if config.get("add_prefix_space") or pre and pre.pre_tokenize_str("a")[0][0] != "a":
                # An answer is encoded apart from its prompt: each would begin with such a space.
                raise ValueError("add_prefix_space is not computed here")
            special = backend.get_added_tokens_decoder()
            ends = [special[i].content for i in end_ids(folder) if i in special]
            return cls(backend, ends[0] if ends else eos or EOS, pad or PAD, unk or UNK)

    def save_pretrained(self, folder):
        """Write tokenizer.json and tokenizer_config.json, with which AutoTokenizer gives the same
        ids. A model's config.json in the folder tells how long a text may be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast",
                  "split_special_tokens": True, "clean_up_tokenization_spaces": False}
        ids = {"bos_token": self.eos, "eos_token": self.eos, "pad_token": self.pad,
               "unk_token": self.unk}
        config |= {field: self.backend.id_to_token(i) for field, i in ids.items() if i is not None}
        model = load_json(folder / "config.json")
        if model:
            config["model_max_length"] = model["n_positions"]
        write_json(folder / "tokenizer_config.json", config)
        write_aside(folder / "tokenizer.json", lambda part: self.backend.save(str(part)))


def token_text(token):
    """The text of a token in tokenizer_config.json: a string, or an object that has it."""
    return token["content"] if isinstance(token, dict) else token


def add_tokens(backend, config, added):
    """Give a backend the tokens that stand beside its own file: those of added_tokens.json, {text:
    id}, and of tokenizer_config.json. Raises ValueError where one cannot have its id."""
    roles = {token_text(token) for role, token in config.items() if role.endswith("_token")}
    roles |= {token_text(token) for token in config.get("additional_special_tokens") or []}
    tokens = {i: {"content": text, "special": text in roles} for text, i in added.items()}
    tokens |= {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items()}
    for i, token in sorted(tokens.items()):
        backend.add_tokens([tokenizers.AddedToken(**token)])
        if backend.token_to_id(token["content"]) != i:
            raise ValueError(f"the added token {token['content']!r} cannot have the id {i}")


def word_tokenizer(words):
    """Word-level tokenizer of a closed vocabulary; any other word becomes UNK."""
    vocabulary = {word: i for i, word in enumerate([PAD, EOS, UNK, *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([PAD, EOS, UNK])
    return Tokenizer(backend)


def bpe_tokenizer(texts, vocab_size):
    """Byte-level BPE, as GPT-2's, trained on these texts: it can write and read any bytes."""
    backend, pre = byte_level(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    # Training takes the square of a word's length, so a word ends after LONG_WORD characters.
    cut = pre.Split(tokenizers.Regex(rf"\S{{{LONG_WORD}}}|\s{{{LONG_WORD}}}"), "isolated")
    backend.pre_tokenizer = pre.Sequence([cut, backend.pre_tokenizer])
    backend.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return Tokenizer(backend)


def byte_level(bpe):
    """The tokenizers.Tokenizer of a byte-level BPE: GPT-2's splitting of text and its bytes."""
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend
