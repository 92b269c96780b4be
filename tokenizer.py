"""Text <-> token ids: a byte-level BPE that is trained here, plain bytes, or one of tiktoken's vocabularies.

    tokenizer = make_tokenizer('bpe', 4096, documents, log=print)
    tokenizer.decode(tokenizer.encode('def f(x):')) == 'def f(x):'

tiktoken encodes with all of them; what is trained here is the vocabulary. Only gpt2 and tiktoken's other names may need
the network, and say so.
"""

import heapq
import re
import threading
import time
from collections import Counter, defaultdict

import numpy as np

EOT = '<|endoftext|>'            # ends every document; in a text file, lines of just this separate documents
BPE_SAMPLE = 100_000_000         # characters the vocabulary is learned from at most

# The chunks within which pairs are merged: GPT-4's pattern, each repetition bounded to 64: unbounded ones
# overflow tiktoken's stack on a megabyte of blanks and send the trainer over one endless chunk over and over.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}{1,64}|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]{1,64}[\r\n]{0,64}|\s{0,64}[\r\n]{1,64}|\s{1,64}(?!\S)|\s{1,64}")


class DataError(ValueError):
    """The data or tokenizer asked for cannot be had (data.py raises it too): one line, what is wrong and what to type."""


class Tokenizer:
    """Ids <-> text. tokens: list of the bytes of each id, None for ids that encode no text (eot, gaps)."""

    def __init__(self, name, tokens, pattern=None, eot=None):
        self.name, self.tokens, self.pattern, self.eot = name, tokens, pattern, eot
        self.vocab_size = len(tokens)
        self.token_bytes = np.array([len(token or b'') for token in tokens], dtype=np.int64)
        self.encoding = None

    def encode(self, text):
        """str -> list of ids. '<|endoftext|>' in the text is ordinary text, never the eot token."""
        if self.pattern is None:
            return list(text.encode('utf-8', 'replace'))
        if self.encoding is None:     # from our own ranks: tiktoken's loaders cache local files by name and
            import tiktoken           # would serve the old vocabulary after a retraining
            ranks = {token: i for i, token in enumerate(self.tokens) if token is not None}
            self.encoding = tiktoken.Encoding(self.name, pat_str=self.pattern, mergeable_ranks=ranks,
                                              special_tokens={})
        ids = []
        for piece in re.split(r'(\s{4096})', text):     # longer runs overflow the stack with GPT-2's pattern
            ids += self.encoding.encode_ordinary(piece)
        return ids

    def decode_bytes(self, ids):
        """list of ids -> bytes; eot shows as <|endoftext|>. A token may end within a character."""
        return b''.join(EOT.encode() if i == self.eot else self.tokens[i] or b'' for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def state(self):
        """For from_state(), in JSON's types: the bytes of a token as a string of code points below 256."""
        tokens = [None if token is None else token.decode('latin-1') for token in self.tokens]
        return {'name': self.name, 'pattern': self.pattern, 'eot': self.eot, 'tokens': tokens}

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
    words = [list(chunk) for chunk in chunks]
    counts = list(chunks.values())
    pairs, where = Counter(), defaultdict(set)          # pair -> occurrences; -> the words that may hold it
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[w]
            where[pair].add(w)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    started = time.perf_counter()
    while heap and len(tokens) < vocab_size:
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:
            continue                                    # outdated: pushed anew when its count changed
        if -count < 2:
            break
        merged = tokens[pair[0]] + tokens[pair[1]]
        new = ids.setdefault(merged, len(tokens))       # aa|aaa and aaaa|a: the same bytes, one token
        if new == len(tokens):
            tokens.append(merged)
            if new % 1024 == 0:
                log(f'  vocabulary: {new:,} of {vocab_size:,} tokens, {time.perf_counter() - started:.1f} s')
        changed = set()
        for w in where.pop(pair):
            word, out, i = words[w], [], 0
            while i < len(word):                        # left to right
                if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
                    out.append(new)
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            if len(out) == len(word):
                continue
            for old in zip(word, word[1:]):
                pairs[old] -= counts[w]
                changed.add(old)
            for fresh in zip(out, out[1:]):
                pairs[fresh] += counts[w]
                where[fresh].add(w)
                changed.add(fresh)
            words[w] = out
        for touched in changed:
            if pairs[touched] > 0:
                heapq.heappush(heap, (-pairs[touched], touched))
    return tokens


def make_tokenizer(name, vocab_size, documents, log):
    """The tokenizer of that name; bpe learns vocab_size - 1 tokens from the documents, the last id is eot."""
    if name == 'bytes':
        return Tokenizer(name, [bytes([i]) for i in range(256)] + [None], eot=256)
    if name != 'bpe':
        return fetch_tokenizer(name, log)
    import regex
    chunks, seen, pattern = Counter(), 0, regex.compile(PATTERN)
    for text in documents:
        chunks.update(pattern.findall(text[:BPE_SAMPLE - seen]))
        seen += len(text)
        if seen >= BPE_SAMPLE:
            break
    log(f'  vocabulary: {sum(chunks.values()):,} chunks, {len(chunks):,} different')
    tokens = train_bpe({chunk.encode(): count for chunk, count in chunks.items()}, vocab_size - 1, log)
    if len(tokens) < vocab_size - 1:
        log(f'  vocabulary: no pair occurs twice; {len(tokens) + 1:,} tokens instead of {vocab_size:,}')
    return Tokenizer(name, tokens + [None], PATTERN, eot=len(tokens))


def check_tokenizer(name, vocab_size):
    """DataError if there is no such tokenizer; asks neither disk nor network."""
    if name == 'bpe' and not 257 <= vocab_size <= 2**20:
        raise DataError(f'--vocab_size={vocab_size}: bpe takes 257 (256 bytes, end of text) to {2**20:,}')
    if name not in ('bpe', 'bytes'):
        import tiktoken
        known = tiktoken.list_encoding_names()
        if name not in known:
            raise DataError(f'--tokenizer={name} is unknown; there are bpe, bytes, {", ".join(known)}')


def fetch_tokenizer(name, log, seconds=30):
    """One of tiktoken's vocabularies, from its cache or else the network. DataError if it cannot be had."""
    import tiktoken
    log(f'  vocabulary: {name}, from the cache of tiktoken or else downloaded')
    result = []

    def get():
        try:
            result.append(tiktoken.get_encoding(name))
        except Exception as error:
            result.append(error)
    thread = threading.Thread(target=get, daemon=True)  # tiktoken sets no timeout of its own
    thread.start()
    thread.join(seconds)
    encoding = result[0] if result else f'no answer in {seconds} s'
    if not isinstance(encoding, tiktoken.Encoding):
        reason = type(encoding).__name__ if isinstance(encoding, Exception) else encoding
        raise DataError(f'the vocabulary {name} is not in the cache of tiktoken and could not be downloaded '
                        f'({reason}); point TIKTOKEN_CACHE_DIR at a copy of that cache, or take '
                        f'--tokenizer=bpe or --tokenizer=bytes')
    tokens = [None] * encoding.n_vocab
    for token, i in encoding._mergeable_ranks.items():
        tokens[i] = token
    eot = encoding.encode_single_token(EOT) if EOT in encoding.special_tokens_set else None
    return Tokenizer(name, tokens, encoding._pat_str, eot)
