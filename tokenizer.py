"""Text <-> token ids: a byte-level BPE that is trained here, bytes, characters, or one of tiktoken's vocabularies.

    tokenizer = make_tokenizer('bpe', 4096, texts, log=print)
    tokenizer.decode(tokenizer.encode('def f(x):')) == 'def f(x):'

tiktoken encodes; what is trained here is the vocabulary. Only gpt2 and tiktoken's other names may need the network.
"""

import functools
import hashlib
import heapq
import json
import pickle
import re
from collections import Counter, defaultdict
from concurrent.futures import Future
from threading import Thread

EOT = '<|endoftext|>'            # ends every document; in a text file, lines of just this separate documents
BPE_SAMPLE = 100_000_000         # characters the vocabulary is learned from at most

# The chunks within which pairs are merged: GPT-4's pattern, each repetition bounded to 64: unbounded ones
# overflow tiktoken's stack on a megabyte of blanks and send the trainer over one endless chunk over and over.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}{1,64}|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]{1,64}[\r\n]{0,64}|\s{0,64}[\r\n]{1,64}|\s{1,64}(?!\S)|\s{1,64}")


class DataError(ValueError):
    """The data or tokenizer asked for cannot be had: one line, what is wrong, what to type."""


def checksum(value):
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Tokenizer:
    """Ids <-> text. tokens: list of the bytes of each id, None for ids that encode no text (eot, gaps).

    pattern: the regular expression of the chunks that tokens stay within, for tiktoken. Without one every token is
    one byte (name 'bytes') or one character ('characters', nanoGPT's), encoded one by one.
    """

    def __init__(self, name, tokens, pattern=None, eot=None):
        self.name, self.tokens, self.pattern, self.eot = name, tokens, pattern, eot
        self.vocab_size = len(tokens)
        self.ranks = {token: i for i, token in enumerate(tokens) if token is not None}
        self.shown = [EOT.encode() if i == eot else token or b'' for i, token in enumerate(tokens)]

    @functools.cached_property
    def encoding(self):
        """From our own ranks: tiktoken's loaders cache local files by name and would serve an old vocabulary."""
        import tiktoken
        return tiktoken.Encoding(self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={})

    def encode(self, text):
        """str -> list of ids; '<|endoftext|>' in it is ordinary text. DataError: a character that has no id."""
        if self.name == 'bytes':
            return list(text.encode('utf-8', 'replace'))
        if self.pattern is None:
            try:
                return [self.ranks[character.encode('utf-8', 'replace')] for character in text]
            except KeyError as error:
                raise DataError(f'{error.args[0].decode()!a} is not among the {self.vocab_size} characters of this '
                                'vocabulary') from None
        pieces = re.split(r'(\s{4096})', text)          # longer runs overflow the stack with GPT-2's pattern
        return [i for piece in pieces for i in self.encoding.encode_ordinary(piece)]

    def decode_bytes(self, ids):
        """list of ids -> bytes; eot shows as <|endoftext|>, an id beyond the vocabulary (a model may have more ids) as
        nothing. A token may end within a character."""
        return b''.join([self.shown[i] for i in ids if i < self.vocab_size])

    def decode(self, ids):
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def state(self):
        """For from_state(), in JSON's types: the bytes of a token as a string of code points below 256."""
        tokens = [None if token is None else token.decode('latin-1') for token in self.tokens]
        return {'name': self.name, 'pattern': self.pattern, 'eot': self.eot, 'tokens': tokens}

    def sha256(self):
        """Of all that decides which ids a text becomes: equal for equal vocabularies, wherever they are stored."""
        return checksum(self.state())

    @classmethod
    def from_state(cls, state):
        tokens = [None if token is None else token.encode('latin-1') for token in state['tokens']]
        return cls(state['name'], tokens, state['pattern'], state['eot'])


def train_bpe(chunks, vocab_size, log=lambda line: None):
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909, on bytes): {chunk: count} -> tokens by rank.

    Starts from the 256 bytes; the most frequent adjacent pair becomes the next token, until there are
    vocab_size or no pair occurs twice. Among equals the pair with the smaller ids goes first.

    >>> train_bpe({b'ab': 3, b'abc': 2}, 258)[256:]          # (a, b) occurs 5 times, then (ab, c) twice
    [b'ab', b'abc']
    """
    tokens = [bytes([i]) for i in range(256)]
    ids = {token: i for i, token in enumerate(tokens)}
    words = [chunk.decode('latin-1') for chunk in chunks]       # the character chr(i) for id i: str has the fast loops
    counts = list(chunks.values())
    pairs, where = Counter(), defaultdict(set)          # pair -> occurrences; -> the words that may hold it
    for w, word in enumerate(words):
        for pair in map(str.__add__, word, word[1:]):
            pairs[pair] += counts[w]
            where[pair].add(w)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size:
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:
            continue                                    # outdated: pushed anew when its count changed
        if -count < 2:
            break
        merged = tokens[ord(pair[0])] + tokens[ord(pair[1])]
        new = ids.setdefault(merged, len(tokens))       # aa|aaa and aaaa|a: the same bytes, one token
        if new == len(tokens):
            tokens.append(merged)
            if new % 1024 == 0:
                log(f'  vocabulary: {new:,} of {vocab_size:,} tokens')
        new, change = chr(new), defaultdict(int)
        for w in where.pop(pair):
            word = words[w]
            words[w] = shorter = word.replace(pair, new)        # left to right
            for old in map(str.__add__, word, word[1:]):
                change[old] -= counts[w]
            for fresh in map(str.__add__, shorter, shorter[1:]):
                change[fresh] += counts[w]
                if new in fresh:
                    where[fresh].add(w)
        for touched, more in change.items():
            pairs[touched] += more
            if more and pairs[touched] > 0:
                heapq.heappush(heap, (-pairs[touched], touched))
    return tokens


def make_tokenizer(name, vocab_size, texts, log):
    """The tokenizer of that name; bpe learns vocab_size - 1 tokens from the texts, an iterable; the last id is eot."""
    if name == 'bytes':
        return Tokenizer(name, [bytes([i]) for i in range(256)] + [None], eot=256)
    if name != 'bpe':
        return fetch_tokenizer(name, log)
    import regex
    chunks, seen, pattern = Counter(), 0, regex.compile(PATTERN)
    for text in texts:
        chunks.update(pattern.findall(text[:BPE_SAMPLE - seen]))
        seen += len(text)
        if seen >= BPE_SAMPLE:
            break
    tokens = train_bpe({chunk.encode(): count for chunk, count in chunks.items()}, vocab_size - 1, log)
    return Tokenizer(name, tokens + [None], PATTERN, eot=len(tokens))


def check_tokenizer(name, vocab_size):
    """DataError if there is no such tokenizer; asks neither disk nor network."""
    if name == 'bpe' and not 257 <= vocab_size <= 2**20:
        raise DataError(f'--vocab_size={vocab_size}: bpe takes 257 (256 bytes, end of text) to {2**20:,}')
    if name not in ('bpe', 'bytes', 'characters'):
        import tiktoken
        known = tiktoken.list_encoding_names()
        if name not in known:
            raise DataError(f'--tokenizer={name} is unknown; there are bpe, bytes, {", ".join(known)}')


def fetch_tokenizer(name, log):
    """One of tiktoken's vocabularies, from its cache or else the network. DataError if it cannot be had."""
    import tiktoken
    log(f'  vocabulary: {name}, from the cache of tiktoken or else downloaded')
    got = Future()

    def fetch():
        try:
            got.set_result(tiktoken.get_encoding(name))
        except Exception as error:
            got.set_exception(error)
    Thread(target=fetch, daemon=True).start()           # tiktoken sets no timeout; at exit nobody waits for a daemon
    try:
        encoding = got.result(timeout=30)
    except Exception as error:
        raise DataError(f'the vocabulary {name} is not in the cache of tiktoken and could not be downloaded '
                        f'({type(error).__name__}); point TIKTOKEN_CACHE_DIR at a copy of that cache') from None
    tokens = [None] * encoding.n_vocab
    for token, i in encoding._mergeable_ranks.items():
        tokens[i] = token
    eot = encoding.encode_single_token(EOT) if EOT in encoding.special_tokens_set else None
    return Tokenizer(name, tokens, encoding._pat_str, eot)


class Unpickler(pickle.Unpickler):
    """Of numbers, texts and containers alone: a pickle that names anything else could run it."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def read_characters(path):
    """nanoGPT's meta.pkl, {'vocab_size': V, 'itos': {id: character}, 'stoi': {character: id}} -> Tokenizer."""
    try:
        with open(path, 'rb') as file:
            meta = Unpickler(file).load()
        itos = [meta['itos'][i] for i in range(meta['vocab_size'])]
        stoi = {character: i for i, character in enumerate(itos)}
        if meta != {'vocab_size': len(stoi), 'itos': dict(enumerate(itos)), 'stoi': stoi} or {*map(len, itos)} != {1}:
            raise ValueError('its tables do not agree')
        return Tokenizer('characters', [character.encode() for character in itos])
    except Exception as error:                                  # whatever a damaged pickle makes Python raise
        raise DataError(f'{path}: not the table of characters that nanoGPT writes ({error!r}); it would say what the '
                        'ids mean: move it away to train without text') from None
