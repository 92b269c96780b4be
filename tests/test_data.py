"""data.py: splits without leaks, verified token files, batches as functions of (seed, step)."""

import codecs
import hashlib
import io
import json
import math
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import regex
from conftest import REPOSITORY, message_of, silent, text

import data
from data import Corpus, DataError, prepare
from documents import read_documents
from tokenizer import PATTERN, Tokenizer, make_tokenizer, read_characters


@pytest.fixture
def copy(prepared, tmp_path):
    return pathlib.Path(shutil.copytree(prepared, tmp_path / 'copy'))


def tokenizer_of(folder):
    return Corpus(folder, block_size=1).tokenizer


def documents_of(folder, part):
    """The texts of a split, got back from its token file."""
    ids, tokenizer = getattr(Corpus(folder, block_size=1), part), tokenizer_of(folder)
    ends = np.flatnonzero(ids == tokenizer.eot)
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(piece.tolist()[int(i > 0):]) for i, piece in enumerate(np.split(ids, ends)[:-1])]


def refused(call, *arguments, **options):
    """The message of the DataError that the call must raise: one line."""
    with pytest.raises(DataError) as error:
        call(*arguments, **options)
    return message_of(error)


def split(texts, folder):
    """data.split() of a list of texts, read as rows of a file -> (train, val) as lists of texts."""
    (folder / 'rows.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
    spool = io.BytesIO()
    spans, _ = read_documents([folder / 'rows.jsonl'], 'text', False, spool, silent)
    content = spool.getvalue()
    parts = data.split(content, spans)
    return [[content[start:end].decode() for start, end in parts[part]] for part in ('train', 'val')]


# ---- splits ------------------------------------------------------------------------------------------------

def test_every_document_is_on_exactly_one_side_and_copies_are_dropped(prepared):
    train, val = documents_of(prepared, 'train'), documents_of(prepared, 'val')
    assert sorted(train + val) == sorted(text(i) for i in range(60)) and val
    assert not set(train) & set(val)
    meta = data.read_meta(prepared)
    assert meta['train']['documents'] == len(train) and meta['val']['documents'] == len(val)
    val_bytes, all_bytes = (sum(len(t.encode()) for t in part) for part in (val, train + val))
    assert val_bytes == meta['val']['text_bytes'] <= 0.05 * all_bytes


def test_the_vocabulary_knows_nothing_of_the_validation_text(tmp_path):
    folder = tmp_path / 'corpus'
    folder.mkdir()
    for i in range(40):
        (folder / f'{i}.txt').write_text(text(i), encoding='utf-8')
    _, val = split([text(i) for i in range(40)], tmp_path)
    first = prepare(str(folder), 'bpe', 350, tmp_path / 'a', silent)
    for path in folder.iterdir():
        if path.read_text(encoding='utf-8') in val:
            path.unlink()
    rest = [path.read_text(encoding='utf-8') for path in folder.iterdir()]
    same = make_tokenizer('bpe', 350, rest, silent)
    assert tokenizer_of(first).tokens == same.tokens


def test_the_split_does_not_depend_on_names_or_order_and_a_new_document_moves_few(tmp_path):
    documents = [text(i) for i in range(50)]
    train, val = split(documents, tmp_path)
    assert split(documents[::-1], tmp_path) == [train, val] == split(documents + documents[3:9], tmp_path)
    assert train == sorted(train, key=lambda t: hashlib.sha256(t.encode()).digest())
    more, _ = split(documents + [text(99)], tmp_path)
    assert [t for t in more if t in train] == [t for t in train if t in more]
    assert len(set(train) - set(more)) < 5


@pytest.mark.parametrize('single', ['a line\n' * 100, 'no line end at all ' * 50, 'x' * 97 + '\nab',
                                    'ab\n' + 'x' * 97, 'ab\n' + 'x' * 97 + '\n', 'xy', '\u4e2d\u6587' * 41])
def test_a_single_text_is_cut_near_its_end_and_loses_nothing(tmp_path, single):
    (train,), (val,) = split([single], tmp_path)
    assert train + val == single and train and val
    # an early line end is no place to cut: 'ab' was to train, and 97 x to validate
    assert len(val) <= len(single) / 10 + 1
    assert '\n' not in single[-len(single) // 10:-1] or train.endswith('\n')


def test_a_file_is_split_at_its_end_of_text_lines(tmp_path):
    path = tmp_path / 'stories \u00fc.txt'
    path.write_bytes('\r\n<|endoftext|>\r\n'.join(text(i) for i in range(30)).encode() + b'\n<|endoftext|>')
    folder = prepare(str(path), 'bytes', 0, tmp_path / 'root', silent)
    found = documents_of(folder, 'train') + documents_of(folder, 'val')
    assert sorted(t.strip() for t in found) == sorted(text(i).strip() for i in range(30))
    inline = tmp_path / 'inline.txt'
    inline.write_text('about <|endoftext|> in a line\n' * 30)
    assert Corpus(prepare(str(inline), 'bytes', 0, tmp_path / 'root', silent),
                  block_size=4).meta['train']['documents'] == 1


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize('source', ['def f(x):\n    return x  # a line\n\n\n' * 40_000, 'one line, and no end of it; ' * 50_000])
def test_text_is_cut_where_no_chunk_of_a_tokenizer_goes_over_also_where_lines_never_end(source):
    pieces = [piece for piece, _ in data.pieces(source.encode(), np.array([[0, len(source)]]), 'x', silent)]
    assert len(pieces) == 2 and ''.join(pieces) == source and len(pieces[0]) < 2**20 + 2**16
    for pattern in (PATTERN, GPT2):
        assert [chunk for piece in pieces for chunk in regex.findall(pattern, piece)] == regex.findall(pattern, source)


# ---- the embedded corpus -----------------------------------------------------------------------------------

def test_the_standard_library_makes_a_corpus_of_millions_of_tokens_without_tests(tmp_path):
    lines = []
    folder = prepare('stdlib', 'bpe', 4096, tmp_path, lines.append)
    corpus = Corpus(folder, max_train_tokens=500_000)
    assert folder.name.startswith(f'stdlib-{".".join(map(str, sys.version_info[:3]))}-bpe4096-')
    assert corpus.remarks == []
    assert corpus.meta['train']['tokens'] > 2_000_000 and corpus.vocab_size == 4096
    assert len(corpus.train) == 500_000
    train_bytes, val_bytes = (corpus.meta[part]['text_bytes'] for part in ('train', 'val'))
    share = val_bytes / (train_bytes + val_bytes)
    assert 0.04 < share <= 0.05 and any('tokens' in line for line in lines)
    _, path, _, files, _ = data.locate('stdlib')
    names = [file.relative_to(path).as_posix() for file in files]
    assert 'argparse.py' in names and 'json/decoder.py' in names
    assert not any(part in ('test', 'tests', 'site-packages', '__pycache__') for name in names
                   for part in name.split('/'))
    facts = corpus.describe()
    assert facts['uniform_loss'] == math.log(4096) and 5 < facts['unigram_loss'] < 8
    assert 3 < facts['val_bytes'] / (facts['val_tokens'] - 1) < 5
    lines.clear()                                            # a second call returns without a word
    assert prepare('stdlib', 'bpe', 4096, folder.parent, lines.append) == folder and lines == []


# ---- batches -----------------------------------------------------------------------------------------------

def test_a_batch_is_a_pure_function_of_seed_and_step(prepared):
    a, b = Corpus(prepared, block_size=16), Corpus(prepared, block_size=16)
    for step in (5, 300, 0, 299, 5):
        for seed in (0, 3):
            x, y = a.batch(seed, step, 8)
            assert x.shape == y.shape == (8, 16) and x.dtype == y.dtype == np.int64
            assert (x[:, 1:] == y[:, :-1]).all()
            again = Corpus(prepared, block_size=16).batch(seed, step, 8)
            assert (again[0] == x).all() and (again[1] == y).all()
    assert not (b.batch(0, 1, 8)[0] == b.batch(1, 1, 8)[0]).all()


def test_the_same_windows_come_whatever_the_batch_size(prepared):
    corpus = Corpus(prepared, block_size=32)
    large = np.concatenate([corpus.batch(1, step, 24)[0] for step in range(30)])
    small = np.concatenate([corpus.batch(1, step, 6)[0] for step in range(120)])
    assert (large == small).all()


@pytest.mark.parametrize('length, block',
                         [(1000, 16), (17, 16), (31, 16), (32, 16), (33, 16), (500, 1), (2, 1), (129, 64)])
def test_an_epoch_visits_windows_without_overlap_and_leaves_less_than_two_of_them(prepared, length, block):
    corpus = Corpus(prepared, block_size=block)
    corpus.train = np.arange(length)                         # a token is its position
    n = max(1, (length - block) // block)
    offsets, ends = set(), Counter()
    for epoch in range(60):
        x, y = corpus.batch(7, epoch, n)
        assert len(np.unique(y)) == n * block and (y == x + 1).all()
        assert y.max() - y.min() == n * block - 1 and length - n * block < 2 * block + 1
        offsets.add(x.min())
        ends.update([int(y.max()), int(x.min())])
    if length - n * block >= 10:
        assert len(offsets) > 5
    if length == 1000:
        order = [tuple(corpus.batch(7, epoch, n)[0][:, 0] // block) for epoch in range(2)]
        assert order[0] != order[1] and list(order[0]) != sorted(order[0])


def test_a_batch_longer_than_the_corpus_runs_on_into_further_epochs(prepared):
    corpus = Corpus(prepared, max_train_tokens=40, block_size=16)
    x, _ = corpus.batch(0, 1, 50)
    assert x.shape == (50, 16)


@pytest.mark.parametrize('length', [17, 18, 32, 33, 34, 1000])
@pytest.mark.parametrize('rows', [1, 3, 100])
def test_validation_windows_make_every_token_but_the_first_a_target_once(prepared, length, rows):
    corpus = Corpus(prepared, block_size=16)
    corpus.val = np.arange(length) + 5
    parts = corpus.val_windows(rows)
    assert all(x.shape == y.shape and x.dtype == y.dtype == np.int64 and (x == y - 1).all() for x, y in parts)
    assert np.concatenate([y.ravel() for _, y in parts]).tolist() == list(range(6, length + 5))
    full, rest = divmod(length - 1, 16)
    assert sorted(x.shape for x, _ in parts if x.shape[1] < 16) == [(1, rest)] * (rest > 0)     # unpadded, by itself
    sizes = [len(x) for x, _ in parts if x.shape[1] == 16]
    assert sum(sizes) == full and all(size == rows for size in sizes[:-1]) and sizes[-1] <= rows


def test_the_description_agrees_with_a_count_by_hand(prepared):
    corpus = Corpus(prepared, max_train_tokens=1500, max_val_tokens=200, block_size=8)
    facts, tokenizer = corpus.describe(), corpus.tokenizer
    seen, V = Counter(corpus.train.tolist()), corpus.vocab_size
    targets = corpus.val[1:].tolist()
    loss = -sum(math.log((seen[t] + 1) / (1500 + V)) for t in targets) / len(targets)
    assert facts['unigram_loss'] == pytest.approx(loss, rel=1e-12) and facts['uniform_loss'] == math.log(V)
    assert facts['val_bytes'] == sum(0 if t == tokenizer.eot else len(tokenizer.decode_bytes([t]))
                                     for t in targets)
    assert (facts['train_tokens'], facts['val_tokens'], facts['max_train_tokens']) == (1500, 200, 1500)
    assert facts['train_sha256'] == hashlib.sha256((prepared / 'train.bin').read_bytes()).hexdigest()
    assert json.loads(json.dumps(facts)) == facts


def test_the_validation_text_has_one_hash_whatever_the_tokenizer(prepared, texts, tmp_path):
    """So that bits per byte of two tokenizers are compared on the same text, and on no other."""
    as_bytes = prepare(str(texts), 'bytes', 0, tmp_path, silent)
    bpe, raw = (Corpus(folder, block_size=8).describe() for folder in (prepared, as_bytes))
    said = ''.join(t + '<|endoftext|>' for t in documents_of(prepared, 'val'))
    assert bpe['val_text_sha256'] == raw['val_text_sha256'] == hashlib.sha256(said.encode()).hexdigest()
    assert bpe['vocab_sha256'] != raw['vocab_sha256'] and bpe['vocab_sha256'] == tokenizer_of(prepared).sha256()
    cut = [Corpus(folder, max_val_tokens=300, block_size=8).describe()['val_text_sha256']
           for folder in (prepared, as_bytes)]
    assert len({*cut, bpe['val_text_sha256']}) == 3


# ---- nanoGPT's token files ---------------------------------------------------------------------------------

def nanogpt(folder, train, val, dtype=np.uint16, meta=None):
    folder.mkdir(exist_ok=True)
    np.array(train, dtype=dtype).tofile(folder / 'train.bin')
    np.array(val, dtype=dtype).tofile(folder / 'val.bin')
    if meta is not None:
        (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return folder


SHAKESPEARE = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def characters(text=SHAKESPEARE):
    return {'vocab_size': len(text), 'itos': dict(enumerate(text)), 'stoi': {c: i for i, c in enumerate(text)}}


def test_nanogpts_files_are_used_where_they_lie(tmp_path):
    source = nanogpt(tmp_path / 'shakespeare char', list(range(65)) * 9, list(range(65)))
    folder = prepare(str(source), 'bpe', 4096, tmp_path / 'root', silent)
    corpus = Corpus(folder, block_size=8)
    assert corpus.vocab_size == 65 and corpus.train.tolist() == list(range(65)) * 9 and corpus.tokenizer is None
    facts = corpus.describe()
    assert facts['val_bytes'] is facts['val_text_sha256'] is facts['vocab_sha256'] is None
    assert corpus.tokenizer_name == facts['tokenizer'] == 'unknown' and 'not known' in corpus.remarks[0]
    assert not (folder / 'train.bin').exists()
    nanogpt(source, [1] * 50, [2] * 50)      # replaced: not served stale
    assert len(Corpus(prepare(str(source), 'bpe', 4096, tmp_path / 'root', silent), block_size=8).train) == 50


@pytest.mark.parametrize('alphabet', [SHAKESPEARE, '\n \u00e9\u4e2d\U0001f600ab'])
def test_the_characters_of_meta_pkl_give_text_bytes_and_ids_back(tmp_path, alphabet):
    """Against nanoGPT's own way: decode = ''.join(itos[i] for i in ids), encode = [stoi[c] for c in text]."""
    meta, rng = characters(alphabet), random.Random(0)
    ids = [rng.randrange(len(alphabet)) for _ in range(3000)]
    source = nanogpt(tmp_path / 'x', ids, ids[:500], meta=meta)
    folder = prepare(str(source), 'bpe', 4096, tmp_path / 'root', silent)
    assert folder.name.endswith(prepare(str(source), 'bpe', 300, tmp_path / 'root', silent).name)
    corpus = Corpus(folder, block_size=8)
    said = ''.join(meta['itos'][i] for i in ids[:500])
    assert corpus.tokenizer_name == corpus.describe()['tokenizer'] == 'characters' and corpus.remarks == []
    assert corpus.vocab_size == len(alphabet) and corpus.tokenizer.eot is None
    again = Tokenizer.from_state(json.loads(json.dumps(corpus.tokenizer.state())))
    assert again.decode(ids[:500]) == said and again.encode(said) == ids[:500]
    assert again.sha256() == corpus.tokenizer.sha256()
    facts = corpus.describe()
    assert facts['val_bytes'] == len(said[1:].encode())
    assert facts['val_text_sha256'] == hashlib.sha256(said.encode()).hexdigest()
    assert '\\u0416' in refused(again.encode, 'a\u0416b')
    folder = prepare(str(source), 'characters', 0, tmp_path / 'root', silent)
    assert Corpus(folder, block_size=8).tokenizer_name == 'characters'


@pytest.mark.parametrize('tokenizer', ['bytes', 'gpt2', 'cl100k_base'])
def test_a_tokenizer_that_contradicts_meta_pkl_is_refused(tmp_path, tokenizer):
    source = nanogpt(tmp_path / 'x', [1] * 50, [2] * 50, meta=characters())
    message = refused(prepare, str(source), tokenizer, 0, tmp_path / 'root', silent)
    assert 'meta.pkl' in message and '--tokenizer=characters' in message


class Attack:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def bad_tables():
    good = characters()
    yield from ({**good, 'vocab_size': 64}, {**good, 'vocab_size': 66}, {**good, 'stoi': {}}, {'vocab_size': 65})
    yield from ({**good, 'itos': good['itos'] | {3: 'a'}}, {**good, 'itos': good['itos'] | {3: 7}}, good | {'extra': 1})
    yield from ([good], 'x', None, 65, {'vocab_size': 2, 'itos': {0: 'a', 1: 'a'}, 'stoi': {'a': 1}})
    yield from ({**good, 'extra': Attack()}, Attack(), {**good, 'vocab_size': np.int64(65)}, Counter('abc'))
    words = [f'w{i}' for i in range(65)]
    yield {'vocab_size': 65, 'itos': dict(enumerate(words)), 'stoi': {word: i for i, word in enumerate(words)}}


@pytest.mark.parametrize('content', [
    *(pickle.dumps(table) for table in bad_tables()), b'', b'cos\nsystem\n(S"mkdir executed"\ntR.', b'PK\3\4',
    pickle.dumps(characters())[:-9], pickle.dumps(characters(), protocol=0)[:99],
    pickle.dumps(characters('\ud800ab'), protocol=2)])
def test_a_meta_pkl_that_is_anything_else_is_refused_and_never_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    source = nanogpt(tmp_path / 'x', [1] * 50, [2] * 50)
    (source / 'meta.pkl').write_bytes(content)
    assert 'meta.pkl' in refused(prepare, str(source), 'bpe', 4096, tmp_path / 'root', silent)
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_of_meta_pkl_is_read(tmp_path, protocol):
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(characters(), protocol))
    assert read_characters(tmp_path / 'meta.pkl').decode([59, 46, 43]) == 'uhe'


@pytest.fixture
def gpt2(monkeypatch):
    """gpt2's vocabulary as far as sizes go; gpt2.online says whether it can be had."""
    def fetch(name, log):
        state.asked += 1
        if not state.online:
            raise DataError('offline')
        return Tokenizer('gpt2', [f'<{i}>'.encode() for i in range(50256)] + [None], 'x', eot=50256)
    state = SimpleNamespace(online=False, asked=0)
    monkeypatch.setattr('tokenizer.fetch_tokenizer', fetch)
    return state


def test_gpt2_token_files_work_without_the_vocabulary_and_get_it_when_it_can_be_had(tmp_path, gpt2):
    source = nanogpt(tmp_path / 'owt', [50256, 1, 2] * 20, [3, 50256] * 20)
    folder = prepare(str(source), 'gpt2', 0, tmp_path / 'root', silent)
    corpus = Corpus(folder, block_size=8)
    facts = corpus.describe()
    assert facts['vocab_size'] == 50257 and facts['val_bytes'] is None and facts['tokenizer'] == 'gpt2'
    assert 'offline' in corpus.remarks[0] and '--tokenizer' not in corpus.remarks[0]    # these tokens are given
    assert prepare(str(source), 'gpt2', 0, tmp_path / 'root', silent) == folder
    gpt2.online = True
    assert prepare(str(source), 'gpt2', 0, tmp_path / 'root', silent) == folder
    for gpt2.online in (True, False):                    # and keeps it
        corpus = Corpus(prepare(str(source), 'gpt2', 0, tmp_path / 'root', silent), block_size=8)
        facts = corpus.describe()
        assert facts['val_bytes'] == 3 * 19 and facts['vocab_size'] == 50257 and corpus.remarks == []
        assert corpus.tokenizer.decode([2]) == '<2>' and corpus.tokenizer.eot == 50256 and gpt2.asked == 3


WIDE = [[*random.Random(largest).choices(range(largest), k=999), largest]
        for largest in (300, 50256, 65535, 65536, 100276, 200018, 2**20 - 1)]
NARROW = [[1, 0] * 50, [0] * 50, list(range(65)) * 9, [50256, 3, 0, 110] * 99, [1, 0, 0, 0] * 50, [40000, 12] * 50]


@pytest.mark.parametrize('ids, dtype', [(ids, 'uint32') for ids in WIDE] + [(ids, 'uint16') for ids in NARROW])
def test_files_of_16_and_of_32_bit_ids_are_told_apart(tmp_path, ids, dtype):
    source = nanogpt(tmp_path / 'x', ids, ids, dtype)
    corpus = Corpus(prepare(str(source), 'bpe', 4096, tmp_path / 'root', silent), block_size=8)
    assert corpus.train.tolist() == corpus.val.tolist() == ids and corpus.vocab_size == max(ids) + 1


def test_ids_as_wide_as_the_vocabulary_named_says(tmp_path, monkeypatch):
    monkeypatch.setattr('tokenizer.fetch_tokenizer', lambda name, log: Tokenizer(name, [b'x'] * 100277, 'x'))
    source = nanogpt(tmp_path / 'x', [7, 5, 3] * 20, [3, 1] * 20, np.uint32)     # no pattern to be seen
    corpus = Corpus(prepare(str(source), 'cl100k_base', 0, tmp_path / 'root', silent), block_size=8)
    assert corpus.train.tolist() == [7, 5, 3] * 20 and corpus.tokenizer_name == 'cl100k_base'


def test_ids_of_a_known_vocabulary_are_no_wider_than_it_though_almost_all_are_below_16(tmp_path):
    ids = [5, 3, 9, 1, 12, 0, 7, 15] * 100 + [17, 16]            # read as 32 bits: 0 to 15 above, something below
    source = nanogpt(tmp_path / 'x', ids, ids, meta=characters(SHAKESPEARE[:18]))
    corpus = Corpus(prepare(str(source), 'bpe', 4096, tmp_path / 'root', silent), block_size=8)
    assert corpus.train.tolist() == ids and corpus.vocab_size == 18


LLM_C = np.array([20240520, 1, 900] + [0] * 253, np.int32).tobytes()


@pytest.mark.parametrize('content, part', [
    (b'', '0 bytes'), (b'abc', '3 bytes'),
    (LLM_C + np.arange(900, dtype=np.uint16).tobytes(), 'llm.c'), (np.arange(900, dtype=np.int64).tobytes(), '64-bit'),
    ((np.arange(900, dtype=np.int64) * 100).tobytes(), '64-bit'),
    (np.arange(65000, 70000, dtype=np.uint32).tobytes() + b'ab', 'bytes'),
    (np.append(np.arange(900) * 500, 2**31).astype(np.uint32).tobytes(), 'id 2,147')])
def test_what_cannot_be_ids_is_refused(tmp_path, content, part):
    for names in (['val.bin'], ['train.bin', 'val.bin']):
        source = nanogpt(tmp_path / 'x', [1] * 50, [2] * 50)
        for name in names:
            (source / name).write_bytes(content)
        message = refused(prepare, str(source), 'bpe', 4096, tmp_path / 'root', silent)
        assert names == ['val.bin'] and 'val.bin' in message or part in message and 'train.bin' in message


def test_a_token_file_that_cannot_be_read_is_named_and_not_the_place_of_the_result(tmp_path):
    source = nanogpt(tmp_path / 'x', [1] * 50, [2] * 50)
    (source / 'train.bin').unlink()
    (source / 'train.bin').mkdir()
    assert 'x/train.bin cannot be read (Is a directory)' in refused(prepare, str(source), 'bpe', 4096, tmp_path / 'root', silent)


def test_characters_are_not_taken_for_bytes(tmp_path):
    source = nanogpt(tmp_path / 'x', list(range(65)) * 50, list(range(65)) * 50)
    assert 'no text' in refused(prepare, str(source), 'bytes', 0, tmp_path / 'root', silent)
    nanogpt(source, [*text(3).encode(), 256] * 9, [*text(4).encode(), 256])
    corpus = Corpus(prepare(str(source), 'bytes', 0, tmp_path / 'root', silent), block_size=8)
    assert corpus.describe()['val_bytes'] == len(text(4).encode()) - 1


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    source = nanogpt(tmp_path / 'x', [1, 999] * 50, [2] * 50)
    assert '999' in refused(prepare, str(source), 'bytes', 0, tmp_path / 'root', silent)


def test_a_prepared_folder_can_be_given_as_the_dataset_with_no_other_tokenizer(prepared, texts, tmp_path):
    lines = []
    assert prepare(str(prepared), 'bpe', 4096, 'unused', lines.append) == prepared.resolve()
    assert 'vocabulary' in lines[0]
    as_bytes = prepare(str(texts), 'bytes', 0, tmp_path, silent)
    assert prepare(str(as_bytes), 'bytes', 0, 'unused', silent) == as_bytes.resolve()
    for folder, tokenizer in ((prepared, 'bytes'), (prepared, 'gpt2'), (as_bytes, 'bpe'), (as_bytes, 'characters')):
        assert 'contradicts' in refused(prepare, str(folder), tokenizer, 4096, 'unused', silent)
    source = nanogpt(tmp_path / 'x', [1] * 50, [2] * 50)        # of an unknown vocabulary, for which there is no --tokenizer
    unknown = prepare(str(source), 'bpe', 4096, tmp_path, silent)
    assert prepare(str(unknown), 'bpe', 4096, 'unused', silent) == unknown.resolve()


# ---- bad corpora -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make, part', [
    (lambda p: None, 'No such file'), (lambda p: p.mkdir(), 'no text files'),
    (lambda p: p.write_bytes(b''), 'too little'),
    (lambda p: p.write_bytes(b' \n\n'), 'too little'), (lambda p: p.write_bytes(b'x'), 'too little'),
    (lambda p: (p.mkdir(), (p / 'a.jsonl').write_text('{"text": "\u4e2d"}\n' * 9)), 'too little'),
    (lambda p: p.write_bytes(b'caf\xe9'), 'not UTF-8'), (lambda p: p.write_bytes(b'BZh91AY\xff'), 'of packed files only .gz is read'),
    (lambda p: (p.mkdir(), (p / 'a.txt').write_bytes(b'\xff\xfa')), 'a.txt: not UTF-8'),
    (lambda p: p.write_bytes(b'\xff\xfea'), 'not UTF-16'),
    (lambda p: p.write_bytes('some text'.encode('utf-16-le')), 'zero bytes'),
    (lambda p: (p.mkdir(), (p / 'a.txt').symlink_to('nowhere')), 'a.txt: cannot be read'),
    (lambda p: p.symlink_to(p), ''), (lambda p: (p.mkdir(), (p / 'a.txt').mkdir()), 'no text files')])
def test_a_corpus_that_is_none_ends_in_one_line(tmp_path, make, part):
    make(tmp_path / 'corpus')
    message = refused(prepare, str(tmp_path / 'corpus'), 'bytes', 0, tmp_path / 'root', silent)
    assert part in message and 'corpus' in message
    assert not list(tmp_path.glob('root/*')) and not list(tmp_path.glob('root/.*'))


@pytest.mark.parametrize('dataset', ['', 'no\0thing', '~nobody-here/x', 'x' * 5000, '/dev/null'])
def test_a_path_that_cannot_be_one_ends_in_one_line(tmp_path, dataset):
    refused(prepare, dataset, 'bytes', 0, tmp_path, silent)


@pytest.mark.skipif(not hasattr(os, 'seteuid'), reason='rights as POSIX has them')
@pytest.mark.parametrize('closed, mode', [('', 0), ('', 0o400), ('a.txt', 0), ('b', 0)])
def test_what_may_not_be_read_ends_in_one_line(closed, mode):
    with tempfile.TemporaryDirectory() as place:            # not tmp_path: only its owner gets there
        source = pathlib.Path(place, 'corpus')
        source.mkdir()
        (source / 'a.txt').write_text('secret ' * 99)
        (source / 'b').mkdir()                              # a folder that holds nothing, as far as one may look
        for path in (place, source):
            os.chmod(path, 0o777)
        (source / closed).chmod(mode)
        codecs.lookup('utf-8-sig')                          # Python's own files may be closed to the other user too
        before = os.geteuid()
        os.seteuid(before or 65534)                         # root reads everything
        try:
            assert 'cannot be read (Permission denied)' in refused(prepare, str(source), 'bytes', 0, f'{place}/root', silent)
        finally:
            os.seteuid(before)
            source.chmod(0o777)


@pytest.mark.parametrize('tokenizer, vocab_size',
                         [('bpe', 256), ('bpe', 0), ('bpe', -1), ('bpe', 2**40), ('', 300), ('nonsense', 300),
                          ('characters', 300)])
def test_an_impossible_tokenizer_ends_in_one_line(texts, tmp_path, tokenizer, vocab_size):
    assert '--' in refused(prepare, str(texts), tokenizer, vocab_size, tmp_path, silent)


@pytest.mark.parametrize('options, part', [
    ({'block_size': 10**6}, '--block_size'), ({'max_train_tokens': 8, 'block_size': 8}, '--max_train_tokens=8'),
    ({'max_val_tokens': 10}, '--max_val_tokens=10'), ({'max_train_tokens': -1}, '--max_train_tokens=-1')])
def test_a_split_shorter_than_the_context_is_refused_for_its_own_reason(prepared, options, part):
    message = refused(Corpus, prepared, **{'block_size': 64, **options})
    assert part in message and ('more text' in message) == (part == '--block_size')


# ---- damaged files -----------------------------------------------------------------------------------------

def flipped(content, i, bit):
    return content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1:]


def damages():
    """(name, function bytes -> bytes or None for a folder in its place), the same every time."""
    rng = random.Random(0)
    cases = [('emptied', lambda b: b''), ('replaced by a folder', None),
             ('replaced by text', lambda b: b'hello'),
             ('replaced by a JSON list', lambda b: b'[1]'),
             ('replaced by deep JSON', lambda b: b'[' * 100000), ('doubled', lambda b: b + b),
             ('one byte longer', lambda b: b + b'\0'), ('zeroed', lambda b: bytes(len(b))),
             ('reversed', lambda b: b[::-1])]
    for share in [rng.random() for _ in range(12)]:
        cases.append((f'cut at {share:.3f}', lambda b, s=share: b[:int(len(b) * s)]))
    for share, bit in [(rng.random(), rng.randrange(8)) for _ in range(25)]:
        cases.append((f'bit {bit} flipped at {share:.3f}',
                      lambda b, s=share, k=bit: flipped(b, int(len(b) * s), k)))
    return cases


@pytest.mark.parametrize('name', ['train.bin', 'val.bin', 'meta.json', 'vocab.json'])
def test_a_damaged_file_is_named_with_the_way_out_and_never_used(prepared, copy, name):
    whole, reference = (prepared / name).read_bytes(), Corpus(prepared, block_size=8)
    for what, damage in damages():
        path = copy / name
        path.unlink()
        path.mkdir() if damage is None else path.write_bytes(damage(whole))
        try:
            corpus = Corpus(copy, block_size=8)
        except DataError as error:
            assert '\n' not in str(error) and name in str(error)
            assert ('mv ' in str(error) or 'format' in str(error)) and 'rm ' not in str(error), (what, error)
        else:       # a flip between blank and tab in the JSON, say: harmless only if all is as it was
            assert name == 'meta.json' and corpus.meta == reference.meta, what
        if damage is None:
            path.rmdir()
            path.touch()
    path.unlink()
    assert name in refused(Corpus, copy, block_size=8)


def test_another_format_is_named_and_a_new_one_gets_its_own_folder(texts, tmp_path, monkeypatch):
    folder = prepare(str(texts), 'bytes', 0, tmp_path, silent)
    for number in (data.FORMAT + 1, data.FORMAT - 1):
        meta = json.loads((folder / 'meta.json').read_bytes()) | {'format': number}
        meta['checksum'] = data.checksum({key: value for key, value in meta.items() if key != 'checksum'})
        (folder / 'meta.json').write_text(json.dumps(meta))
        assert f'format {number}' in refused(Corpus, folder)
        assert f'format {number}' in refused(prepare, str(texts), 'bytes', 0, tmp_path, silent)
    monkeypatch.setattr(data, 'FORMAT', 7)
    assert data.read_meta(prepare(str(texts), 'bytes', 0, tmp_path, silent))['format'] == 7


# ---- writing: stale, interrupted, at once ------------------------------------------------------------------

def test_a_changed_corpus_gets_another_folder_and_the_old_one_stays(tmp_path):
    source, root = tmp_path / 'corpus', tmp_path / 'root'
    source.mkdir()
    for i in range(9):
        (source / f'{i}.txt').write_text(text(i), encoding='utf-8')
    first = prepare(str(source), 'bpe', 300, root, silent)
    before = Corpus(first, block_size=8).describe()
    (source / 'new.txt').write_text(text(99), encoding='utf-8')
    second = prepare(str(source), 'bpe', 300, root, silent)
    after = Corpus(second, block_size=8).describe()
    assert first != second
    assert before['train_sha256'] != after['train_sha256'] and before['vocab_sha256'] != after['vocab_sha256']
    assert before['dataset'] == after['dataset'] == 'corpus'
    assert Corpus(prepare(str(first), 'bpe', 300, root, silent), block_size=8).describe() == before  # a run can go on
    (source / 'new.txt').unlink()
    assert prepare(str(source), 'bpe', 300, root, silent) == first


def test_one_text_by_two_paths_is_described_alike(tmp_path):
    facts = []
    for place in ('a', 'b'):
        (tmp_path / place).mkdir()
        (tmp_path / place / 'x.txt').write_text(text(1, 500), encoding='utf-8')
        folder = prepare(str(tmp_path / place / 'x.txt'), 'bpe', 300, tmp_path / f'root {place}', silent)
        facts.append(Corpus(folder, block_size=8).describe())
    assert facts[0] == facts[1]


def test_two_texts_of_one_name_size_and_time_are_not_taken_for_each_other(tmp_path):
    folders = []
    for place, letter in (('a', 'x'), ('b', 'y')):
        (tmp_path / place).mkdir()
        (tmp_path / place / 'input.txt').write_text(f'{letter} is a letter\n' * 50)
        os.utime(tmp_path / place / 'input.txt', (1e9, 1e9))            # as archives have it
        folders.append(prepare(str(tmp_path / place / 'input.txt'), 'bytes', 0, tmp_path / 'root', silent))
    assert ord('y') in Corpus(folders[1], block_size=8).train and folders[0] != folders[1]


def test_something_else_in_the_place_of_the_folder_is_not_removed(texts, tmp_path):
    folder = prepare(str(texts), 'bytes', 0, tmp_path, silent)
    (folder / 'meta.json').rename(folder / 'thesis.doc')
    assert 'meta.json is missing' in refused(prepare, str(texts), 'bytes', 0, tmp_path, silent)
    assert (folder / 'thesis.doc').exists()


@pytest.mark.parametrize('failure', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
@pytest.mark.parametrize('where', ['replace', 'rename'])
def test_a_full_disk_or_an_interruption_leaves_nothing_half_made(texts, tmp_path, monkeypatch, failure, where):
    def broken(*_):
        raise failure
    monkeypatch.setattr(os, where, broken)
    with pytest.raises(DataError if isinstance(failure, OSError) else KeyboardInterrupt) as error:
        prepare(str(texts), 'bytes', 0, tmp_path / 'root', silent)
    if isinstance(failure, OSError):
        assert 'No space left' in message_of(error) and '--data_root' in message_of(error)
    assert list((tmp_path / 'root').iterdir()) == []


def test_a_tilde_is_the_home_of_corpus_and_root(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'a.txt').write_text(text(1))
    assert prepare('~/a.txt', 'bytes', 0, '~/root', silent).parent == tmp_path / 'root'


def test_a_root_that_cannot_be_written_is_said_with_the_way_out(texts, tmp_path):
    (tmp_path / 'file').write_text('')
    assert '--data_root' in refused(prepare, str(texts), 'bytes', 0, tmp_path / 'file', silent)


def command(*argv, **options):
    return subprocess.Popen([sys.executable, str(REPOSITORY / 'data.py'), *map(str, argv)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


def test_processes_that_prepare_at_once_end_in_one_good_result(texts, prepared, tmp_path):
    root = tmp_path / 'root'
    runs = [command(f'--dataset={texts}', '--vocab_size=400', f'--data_root={root}', cwd=tmp_path) for _ in range(2)]
    for run in runs:
        out, err = run.communicate(timeout=60)
        assert run.returncode == 0 and err == '' and 'ready and verified' in out, err
    (folder,) = root.iterdir()
    assert folder.name == prepared.name
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {path.name: path.read_bytes()
                                                                           for path in prepared.iterdir()}


@pytest.mark.skipif(os.name != 'posix', reason='kill -9')
def test_killed_at_any_moment_it_leaves_the_place_empty_or_complete(texts, tmp_path):
    rng = random.Random(1)
    for trial in range(8):
        root = tmp_path / f'root{trial}'
        run = command(f'--dataset={texts}', '--vocab_size=400', f'--data_root={root}')
        try:
            run.wait(timeout=0.1 + 0.5 * rng.random())
        except subprocess.TimeoutExpired:
            run.kill()
        run.communicate()
        for folder in root.glob('[!.]*'):
            Corpus(folder, block_size=8)
    assert Corpus(prepare(str(texts), 'bpe', 400, root, silent), block_size=8).vocab_size > 300


def test_a_reader_that_goes_away_ends_nothing(texts, tmp_path):
    run = command(f'--dataset={texts}', '--tokenizer=bytes', f'--data_root={tmp_path}')
    run.stdout.close()                                       # as `| head -0` does
    assert run.stderr.read() == '' and run.wait(timeout=60) == 0 and len(list(tmp_path.iterdir())) == 1
    run.stderr.close()


def test_the_command_says_last_what_was_not_had(tmp_path):
    (tmp_path / '\u6a21\u578b.txt').write_text('abc abd\n' * 40)
    for _ in range(2):
        run = command('--vocab_size=70000', f'--dataset={tmp_path}/\u6a21\u578b.txt', f'--data_root={tmp_path}/root',
                      env={**os.environ, 'PYTHONIOENCODING': 'cp1252'})
        out, err = run.communicate(timeout=60)
        assert run.returncode == 0 and err == '' and 'instead of 70,000' in out.splitlines()[-1], err


@pytest.mark.parametrize('argv, part', [(['--dataset=missing'], 'No such file'), (['--vocab_size=3'], '257'),
                                        (['--tokeniser=bpe'], '--tokenizer=bpe'),
                                        (['--dataset=stdlib', '--tokenizer=none'], 'unknown')])
def test_the_command_ends_a_mistake_in_one_line_and_status_2(tmp_path, argv, part):
    run = command(*argv, f'--data_root={tmp_path}', cwd=tmp_path)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 2 and err.count('\n') == 1 and err.startswith('data.py: ') and part in err, err
