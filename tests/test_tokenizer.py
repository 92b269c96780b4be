"""tokenizer.py: BPE against one that counts anew each time, encoding against merging by rank, any text and back."""

import math
import random
import subprocess
import sys
from collections import Counter

import pytest
from conftest import REPOSITORY, message_of, silent, text

import tokenizer
from data import prepare
from test_data import tokenizer_of
from tokenizer import PATTERN, DataError, Tokenizer, make_tokenizer, train_bpe


def naive_bpe(chunks, vocab_size):
    """Byte-pair encoding as one would say it: count all pairs, merge the best, start over."""
    tokens, words = [bytes([i]) for i in range(256)], [(list(chunk), n) for chunk, n in chunks.items()]
    while len(tokens) < vocab_size:
        pairs = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merged = tokens[best[0]] + tokens[best[1]]
        if merged not in tokens:
            tokens.append(merged)
        new = tokens.index(merged)
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [new]
                i += 1
    return tokens


@pytest.mark.parametrize('seed', range(12))
def test_the_heap_learns_the_same_tokens_in_the_same_order_as_counting_anew_each_time(seed):
    rng = random.Random(seed)
    letters = 'ab' if seed % 2 else 'abcde '
    chunks = {''.join(rng.choices(letters, k=rng.randint(1, 14))).encode(): rng.randint(1, 5)
              for _ in range(60)}
    assert train_bpe(chunks, 340) == naive_bpe(chunks, 340)


def test_the_worked_example_of_the_trainer_holds():
    import doctest
    assert doctest.testmod(tokenizer).failed == 0 and doctest.testmod(tokenizer).attempted == 1


def test_encoding_merges_by_rank(prepared):
    """An independent encoder: within a chunk, merge the adjacent pair of the lowest rank, while any is."""
    import regex
    tokenizer = tokenizer_of(prepared)
    rank = {token: i for i, token in enumerate(tokenizer.tokens) if token}
    sample, expected = text(3) + ' \u00e9' + text(1234), []
    for chunk in regex.findall(PATTERN, sample):
        parts = [bytes([b]) for b in chunk.encode()]
        while len(parts) > 1:
            ranks = [rank.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
            i = ranks.index(min(ranks))
            if ranks[i] == math.inf:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        expected += [rank[part] for part in parts]
    assert tokenizer.encode(sample) == expected and len(expected) < len(sample.encode()) / 1.5


@pytest.mark.parametrize('name', ['bpe', 'bytes'])
def test_any_text_survives_encoding_and_decoding(prepared, texts, tmp_path, name):
    pytest.importorskip('hypothesis')
    from hypothesis import HealthCheck, given, settings, strategies as st
    tokenizer = tokenizer_of(prepared if name == 'bpe'
                               else prepare(str(texts), 'bytes', 0, tmp_path, silent))

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.text(st.characters(blacklist_categories=['Cs'])))
    def round_trip(string):
        ids = tokenizer.encode(string)
        assert tokenizer.decode(ids) == string and tokenizer.decode_bytes(ids) == string.encode()
        assert tokenizer.eot not in ids
    round_trip()
    assert tokenizer.decode(tokenizer.encode('a\ud800b'))[0] == 'a'   # half a surrogate pair: replaced
    assert tokenizer.eot == tokenizer.vocab_size - 1 and tokenizer.tokens[tokenizer.eot] is None


def test_the_end_of_text_in_a_text_is_ordinary_text(prepared):
    tokenizer = tokenizer_of(prepared)
    ids = tokenizer.encode('a<|endoftext|>b')
    assert tokenizer.eot not in ids and tokenizer.decode(ids) == 'a<|endoftext|>b'
    assert tokenizer.decode([tokenizer.eot]) == '<|endoftext|>' and '\ufffd' in tokenizer.decode([0xe4])


@pytest.mark.parametrize('run', [' ', '\n', 'a', '!', '7', ' \n', '\u3000', '\u4e2d'])
def test_a_megabyte_without_a_break_is_encoded_and_learned_from_in_seconds(prepared, run):
    tokenizer = tokenizer_of(prepared)
    assert tokenizer.decode(tokenizer.encode(run * 300_000)) == run * 300_000
    gpt2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""   # unbounded
    unbounded = Tokenizer('x', tokenizer.tokens, gpt2)
    assert unbounded.decode(unbounded.encode(run * 300_000)) == run * 300_000
    assert make_tokenizer('bpe', 300, [run * 300_000], silent).vocab_size <= 300


def test_a_vocabulary_that_is_neither_here_nor_reachable_is_said_so_quickly(texts, tmp_path, monkeypatch):
    for name in ('https_proxy', 'HTTPS_PROXY', 'http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')       # refused at once, with and without network
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))
    lines = []
    with pytest.raises(DataError) as error:
        prepare(str(texts), 'gpt2', 0, tmp_path / 'root', lines.append)
    message = message_of(error)
    assert 'gpt2' in message and 'TIKTOKEN_CACHE_DIR' in message
    assert not any('reading' in line for line in lines)         # of a corpus that may take hours
    assert list((tmp_path / 'root').iterdir()) == []
    with pytest.raises(DataError) as error:
        prepare(str(texts), 'gpt-two', 0, tmp_path / 'root', silent)
    assert 'cl100k_base' in message_of(error)


def test_a_network_that_never_answers_does_not_hold_the_program_up_at_its_end():
    code = ('import time, tiktoken, tokenizer\n'
            'tiktoken.get_encoding, wait = lambda name: time.sleep(99), tokenizer.Future.result\n'
            'tokenizer.Future.result = lambda future, timeout: wait(future, timeout / 100)\n'
            'try:\n'
            '    tokenizer.fetch_tokenizer("gpt2", print)\n'
            'except tokenizer.DataError as error:\n'
            '    print(error)\n')
    run = subprocess.run([sys.executable, '-c', code], cwd=REPOSITORY, text=True, capture_output=True, timeout=60)
    assert 'could not be downloaded (TimeoutError)' in run.stdout and run.stderr == ''
