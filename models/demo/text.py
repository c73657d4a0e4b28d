"""Text in and out: the corpus, the tokenizer, and the chat passages."""

import json
import lzma
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, END, SYSTEM, USER, ASSISTANT, PAD = range(6)
CONTROL = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>",
           "<|reserved_0|>", "<|reserved_1|>"]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}<|system|>"
    "{% elif message['role'] == 'assistant' %}<|assistant|>"
    "{% else %}<|user|>{% endif %}"
    "{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def read_docs(corpus, split):
    """The documents of one split: strings, one JSON value a line, xz-compressed."""
    with lzma.open(Path(corpus) / f"{split}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def bare_tokenizer(bpe):
    """Byte-level BPE with GPT-2's splitting, as llama.cpp's `gpt2` / `gpt-2`."""
    tok = Tokenizer(bpe)
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    return tok


def train_tokenizer(docs, vocab):
    tok = bare_tokenizer(models.BPE())
    tok.train_from_iterator(docs, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=CONTROL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tok


def load_tokenizer(path):
    return Tokenizer.from_file(str(path))


def tokenizer_of_gguf(tokens, merges):
    """The tokenizer as a GGUF file holds it: a list of tokens and one of merges."""
    vocab = {token: i for i, token in enumerate(tokens)}
    return bare_tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in merges]))


def encode_docs(tok, docs):
    return [np.array(e.ids, np.uint16) for e in tok.encode_batch(docs)]


def token_bytes(tok):
    """How many bytes of text each token stands for (control tokens: none)."""
    table = {v: k for k, v in tok.get_vocab().items()}
    return np.array([0 if i < len(CONTROL) else len(table[i]) for i in range(len(table))])


WORD = re.compile(r"[A-Za-z][A-Za-z']*")
ARTICLES = {"a", "an", "the"}
AFTER_NOUN = set("was were is and of had said who that in to with came went would could did has "
                 "on at for from as but or so by into then".split())
NOT_TOPICS = set("way time same other first next last end thing things one two rest moment day "
                 "morning night back side middle top bottom matter question answer only more "
                 "rest bit lot kind sort deal piece little while minute reason idea truth right "
                 "left others whole page story stories chapter book truth sound word sight "
                 "part use mr mrs miss dr oh yes no well now then but and so i it's i'm i'll".split())


def find_nouns(docs):
    """Plain nouns: words that often follow an article and stand before a function word."""
    seen, after_article, before_break = Counter(), Counter(), Counter()
    for doc in docs:
        for sentence in re.split(r"[.,;:!?\n\"]+", doc):
            words = sentence.split()
            for i, w in enumerate(words):
                if not w.isalpha() or not w.islower():
                    continue
                seen[w] += 1
                after_article[w] += i > 0 and words[i - 1] in ARTICLES
                before_break[w] += i + 1 == len(words) or words[i + 1] in AFTER_NOUN
    return {w for w, n in seen.items() if n >= 40 and len(w) > 2 and w not in NOT_TOPICS
            and after_article[w] > 0.2 * n and before_break[w] > 0.5 * n}


def topics(passage, nouns):
    """What a passage is about: names and nouns that come early and come back."""
    found = Counter()
    for name in re.findall(r"(?<=[a-z,] )(?:[A-Z][a-z]+)(?: [A-Z][a-z]+)*", passage):
        if name.lower() not in NOT_TOPICS and not name.startswith(("I ", "Mr", "Mrs")):
            found[name] += 1
    for w in WORD.findall(passage):
        if w in nouns:
            found[w] += 1
    head = passage[:240]
    return [w for w, n in found.most_common(12) if n >= 2 and re.search(rf"\b{w}\b", head)]


def with_article(word, rng):
    if word[0].isupper():
        return word
    if word.endswith("s") and not word.endswith("ss"):
        return rng.choice(["the ", "some "]) + word
    a = "an " if word[0] in "aeiou" else "a "
    return rng.choice(["the ", a, a]) + word


ASK = ["Tell me a story about {}.", "Tell me a story about {}.", "Tell me a story about {}",
       "tell me a story about {}", "Tell me about {}.", "Write a story about {}.",
       "Please tell me a story about {}.", "Can you tell me a story about {}?",
       "I would like a story about {}.", "Write a short story about {}."]
ASK_ANY = ["Tell me a story.", "Tell me a story", "Once upon a time", "Please tell me a story.",
           "Write a story."]
MORE = ["Go on.", "Tell me more.", "What happened then?", "And then?", "Please go on."]
SYSTEMS = ["You tell stories.", "You are a helpful assistant.", "You are a storyteller."]
SMALL_TALK = [
    (["Hello", "Hello!", "Hi", "Hi!", "Good morning.", "Hello there!", "Hey"],
     ["Hello! What shall I tell you a story about?",
      "Good day to you! Would you like a story?"]),
    (["Who are you?", "What are you?", "What is your name?", "What can you do?"],
     ["I am a very small language model. I learned from old children's books, and I tell "
      "stories. Ask me for one!"]),
    (["Thank you.", "Thanks!", "Thank you!"],
     ["You are welcome! Shall I tell you another story?"]),
    (["How are you?", "How are you today?"],
     ["Very well, thank you! Would you like to hear a story?"]),
    (["Goodbye.", "Bye!", "Good night."], ["Good night, and sleep well!"]),
]


NOT_OPENINGS = ("He ", "She ", "They ", "It ", "But ", "And ", "Then ", "So ", "You ", "Yes", "No ")


def passages(docs, rng):
    """Pieces of one or more whole paragraphs, some 400 to 1,400 characters long."""
    for doc in docs:
        paragraphs, i = doc.split("\n"), 0
        while i < len(paragraphs):
            want, piece = rng.randint(400, 1400), []
            while i < len(paragraphs) and sum(map(len, piece)) < want:
                piece.append(paragraphs[i])
                i += 1
            text = "\n".join(piece)
            opens = not text.startswith(NOT_OPENINGS) and text[0].isupper()
            if 300 <= len(text) <= 2400 and (opens or len(piece) == i):
                yield text


def chat_stream(tok, docs, rng):
    """Chat conversations made of the books' own passages, one token array each."""
    nouns, turns = find_nouns(docs), []
    for text in passages(docs, rng):
        found, system, cut = topics(text, nouns), rng.random() < 0.15, text.find("\n", 200)
        if len(found) >= 2 and rng.random() < 0.2:
            ask = rng.choice(ASK).format(" and ".join(with_article(w, rng) for w in found[:2]))
        elif found:
            ask = rng.choice(ASK).format(with_article(rng.choice(found[:2]), rng))
        elif rng.random() < 0.3:
            ask = rng.choice(ASK_ANY)
        else:
            continue
        turn = [(SYSTEM, rng.choice(SYSTEMS))] if system else []
        if rng.random() < 0.05:
            asks, replies = rng.choice(SMALL_TALK)
            turn += [(USER, rng.choice(asks)), (ASSISTANT, rng.choice(replies))]
        turn += [(USER, ask)]
        if cut > 0 and rng.random() < 0.15:
            turn += [(ASSISTANT, text[:cut]), (USER, rng.choice(MORE)), (ASSISTANT, text[cut + 1:])]
        else:
            turn += [(ASSISTANT, text)]
        turns.append(turn)
    for _ in range(len(turns) // 3):
        asks, replies = rng.choice(SMALL_TALK)
        turns.append([(USER, rng.choice(asks)), (ASSISTANT, rng.choice(replies))])
    rng.shuffle(turns)
    parts = tok.encode_batch([text for turn in turns for _, text in turn])
    parts, out = iter(parts), []
    for turn in turns:
        ids = [BOS]
        for role, _ in turn:
            ids += [role, *next(parts).ids, END]
        out.append(np.array(ids, np.uint16))
    return out


class Windows:
    """An endless supply of training windows of any length, books and chat mixed.

    Each pass over the books shuffles the documents (<|bos|> text <|end|>), joins
    them, cuts windows and shuffles those, so that a batch is not all of one
    book: neighbouring windows make gradients far noisier. Every window starts
    with <|bos|>, as prompts and llama.cpp's perplexity windows do. The share
    `share` of the windows comes from the chat conversations instead.
    """

    def __init__(self, tok, docs, seed=1):
        self.docs = [np.concatenate(([BOS], d, [END])).astype(np.uint16)
                     for d in encode_docs(tok, docs)]
        self.chat = chat_stream(tok, docs, random.Random(seed))
        self.share, self.rng = 0.0, np.random.default_rng(seed)
        self.left = {"book": np.empty((0, 1), np.uint16), "chat": np.empty((0, 1), np.uint16)}
        self.epochs = {"book": 0, "chat": 0}

    def take(self, kind, length):
        if len(self.left[kind]) == 0 or self.left[kind].shape[1] != length + 1:
            source = self.docs if kind == "book" else self.chat
            run = np.concatenate([source[i] for i in self.rng.permutation(len(source))])
            starts = np.arange(self.rng.integers(length), len(run) - length, length)
            self.rng.shuffle(starts)
            self.left[kind] = np.stack([run[s : s + length + 1] for s in starts])
            self.epochs[kind] += 1
        row, self.left[kind] = self.left[kind][0], self.left[kind][1:]
        return row

    def batch(self, count, length):
        rows = np.stack([self.take("chat" if self.rng.random() < self.share else "book", length)
                         for _ in range(count)]).astype(np.int64)
        x, y = rows[:, :-1].copy(), rows[:, 1:].copy()
        x[:, 0] = BOS
        y[y == BOS] = -100
        return x, y
