"""Tokenizers turn text into token ids and back: words for the toy tasks, byte-level BPE for others.

A tokenizer knows which token ends a text (eos) and which ones no policy may write (suppress). Its
files are those of the `tokenizers` library, which transformers' AutoTokenizer opens too.
"""

from pathlib import Path

import tokenizers

from utils.cli import load_json, require, write_aside, write_json

PAD, EOS, UNK = "<|pad|>", "<|endoftext|>", "<|unk|>"


class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids a policy needs: eos, and pad and unk if it has them.

    Raises InputError if the backend has no token `eos`.
    """

    def __init__(self, backend, eos=EOS):
        self.backend = backend
        # A text may quote "<|endoftext|>", as a page on language models does: there it is text.
        backend.encode_special_tokens = True
        self.eos, self.pad, self.unk = (backend.token_to_id(token) for token in (eos, PAD, UNK))
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
        """Ids that no policy may write: padding and the unknown word."""
        return tuple(i for i in (self.pad, self.unk) if i is not None)

    def encode(self, text):
        """The text's token ids, without an end."""
        return self.backend.encode(text, add_special_tokens=False).ids

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
        """(prompt ids, response ids + EOS).

        Of a prompt longer than max_prompt tokens only the end is used: it is nearest the response.
        A response longer than max_response is cut there and then has no EOS: it is not finished.
        """
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

        Its files are tokenizer.json, or vocab.json and merges.txt, as GPT-2's. A text ends with the
        token of eos_token_id if that is a special one, or else with EOS. Raises InputError.
        """
        from utils.checkpoints import end_ids, first_of, loading
        with loading(name) as folder:
            file = first_of(folder, "tokenizer.json", "vocab.json")
            if file.name == "tokenizer.json":
                backend = tokenizers.Tokenizer.from_file(str(file))
            else:
                merges = first_of(folder, "merges.txt")
                backend = byte_level(tokenizers.models.BPE.from_file(str(file), str(merges)))
            special = backend.get_added_tokens_decoder()
            ends = [special[i].content for i in end_ids(folder) if i in special]
        return cls(backend, ends[0] if ends else EOS)

    def save_pretrained(self, folder):
        """Write tokenizer.json and tokenizer_config.json, with which AutoTokenizer gives the same
        ids. A model's config.json in the folder tells how long a text may be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast",
                  "split_special_tokens": True, "clean_up_tokenization_spaces": False}
        eos = self.backend.id_to_token(self.eos)
        names = {"bos_token": eos, "eos_token": eos, "pad_token": PAD, "unk_token": UNK}
        for field, token in names.items():
            if self.backend.token_to_id(token) is not None:
                config[field] = token
        model = load_json(folder / "config.json")
        if model:
            config["model_max_length"] = model["n_positions"]
        write_json(folder / "tokenizer_config.json", config)
        write_aside(folder / "tokenizer.json", lambda part: self.backend.save(str(part)))


def word_tokenizer(words):
    """Word-level tokenizer of a closed vocabulary; any other word becomes UNK."""
    vocabulary = {word: i for i, word in enumerate([PAD, EOS, UNK, *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([PAD, EOS, UNK])
    return Tokenizer(backend)


def bpe_tokenizer(texts, vocab_size):
    """Byte-level BPE, as GPT-2's, trained on these texts: it can write and read any bytes."""
    backend = byte_level(tokenizers.models.BPE())
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
