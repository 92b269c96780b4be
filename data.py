"""Text -> tokens -> batches. `python data.py --dataset=... --tokenizer=...` prepares token files ahead.

    corpus      stdlib (the standard library of this Python), a file or a folder of files as documents.py reads them, a
                folder with nanoGPT's train.bin and val.bin, which are used where they lie, or one that prepare() made
    tokenizer   bpe (trained on the training split), bytes, gpt2 or another name tiktoken knows: tokenizer.py

prepare() writes data/<dataset>-<tokenizer>-<key>/: train.bin and val.bin (bare token ids), vocab.json, meta.json. The
key changes with all that the tokens depend on: text that changed gets another folder. Corpus() verifies a folder and
serves batches. Documents are split before anything is learned from them, be it the vocabulary: no text of validation,
nor a copy, is ever seen in training. Memory holds a few megabytes of the text at a time.
"""

import hashlib
import json
import math
import mmap
import os
import pathlib
import platform
import re
import secrets
import shlex
import shutil
import sys
import sysconfig
import tempfile
import time

import numpy as np

from documents import ROW_ENDINGS, Documents, ending, list_files
from tokenizer import PATTERN, DataError, Tokenizer, check_tokenizer, make_tokenizer, paced, read_characters

FORMAT = 1                       # of meta.json
VAL_SHARE = 0.05                 # of the bytes


def say(line):
    """print(), at once; a reader who went away, as `| head -1` does, ends nothing."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# Text

def locate(dataset):
    """--dataset -> (kind, path, name): kind is stdlib, file, folder, tokens (nanoGPT's) or prepared (by us)."""
    if dataset == 'stdlib':
        return 'stdlib', pathlib.Path(sysconfig.get_path('stdlib')), f'stdlib-{platform.python_version()}'
    try:
        path = pathlib.Path(dataset or ' ').expanduser().resolve()
        kind = 'file' if path.is_file() else 'folder' if path.is_dir() else None
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f'--dataset={dataset}: {error}') from None
    if kind is None:
        raise DataError(f'--dataset={dataset}: no such file or folder (looked from {os.getcwd()}); give '
                        f'stdlib, a text file, a folder of them, or a folder with train.bin and val.bin')
    has = {name for name in ('train.bin', 'val.bin', 'vocab.json', 'meta.json') if (path / name).exists()}
    kind = 'prepared' if 'meta.json' in has and len(has) > 1 else 'tokens' if has >= {'train.bin', 'val.bin'} else kind
    return kind, path, re.sub(r'[^\w.-]', '_', path.name.encode('utf-8', 'replace').decode())[-80:]


def corpus_files(kind, path):
    """-> list_files() of a corpus. Of the standard library: no tests, nothing this machine put there."""
    if kind == 'folder':
        return list_files(path)
    if kind == 'stdlib':
        skip = ('test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__')
        hidden = ('.', 'config-', '_sysconfigdata', 'sitecustomize', 'usercustomize')
        return list_files(path, ('.py',), skip, hidden, followlinks=False)[0], [], []
    names = ('train.bin', 'val.bin', 'meta.pkl')
    return [path] if kind == 'file' else [path / name for name in names if (path / name).exists()], [], []


def fingerprint(path, files):
    """Changes whenever a file is added, removed, resized or written to; reads no contents."""
    base, digest = path if path.is_dir() else path.parent, hashlib.sha256()
    for file in files:
        try:
            stat = file.stat()
            state = f'{stat.st_size} {stat.st_mtime_ns}'
        except OSError:
            state = 'unreadable'
        digest.update(os.fsencode(f'{file.relative_to(base).as_posix()} {state}\n'))
    return digest.hexdigest()


def split(text, starts, ends, digests):
    """Documents text[start:end], their SHA-256, (n, 32) bytes -> {'train': (n, 2) starts and ends, 'val': ...}, rule.

    Copies are dropped: one could end up on either side. The order is that of the SHA-256: arbitrary, so that the
    first N tokens are a fair sample, yet the same everywhere. In this order documents go to val while they fit into
    5% of the bytes. A lone one is cut at a line end.
    """
    words = digests.view('>u8').astype(np.uint64)               # (n, 4)
    order = np.lexsort(words.T[::-1])
    order = order[np.append(True, (words[order][1:] != words[order][:-1]).any(1))]
    spans = np.stack([starts, ends], 1)[order]                  # (documents, 2)
    if len(spans) == 1:
        start, end = spans[0].tolist()
        at = cut(text, start, end)
        return {'train': np.array([[start, at]]), 'val': np.array([[at, end]])}, 'one document, its last 5% are val'
    sizes = spans[:, 1] - spans[:, 0]
    val, room = np.zeros(len(spans), dtype=bool), VAL_SHARE * sizes.sum()
    for i, size in enumerate(sizes):
        if size <= room:
            val[i], room = True, room - size
    if not val.any():
        val[sizes.argmin()] = True
    rule = 'by document in the order of SHA-256, up to 5% of the bytes are val'
    return {'train': spans[~val], 'val': spans[val]}, rule


def cut(text, start, end):
    """Where to cut a lone document, so that about its last 5% are val: behind a line end if there is one inside."""
    at = start + int((end - start) * (1 - VAL_SHARE))
    line = text.find(b'\n', at, end) + 1 or text.rfind(b'\n', start, at) + 1
    if line == end:                                             # the only line end after 95% is the last one
        line = text.rfind(b'\n', start, end - 1) + 1
    while not line and at < end and text[at] & 0xC0 == 0x80:    # not within a character
        at += 1
    return line or at


def pieces(text, spans):
    """The documents' text, about a megabyte at a time -> (text, whether it ends a document).

    It is cut in front of lines that are not indented: no chunk of a tokenizer goes over that.
    """
    line_start = re.compile(rb'\n(?=\S)')
    for start, end in map(np.ndarray.tolist, spans):
        while start < end:
            stop = next((line.end() for line in line_start.finditer(text, start + 2**20, end)), end)
            yield text[start:stop].decode(), stop == end
            start = stop


# ---------------------------------------------------------------------------------------------------------------------
# Prepared folders

def write_tokens(path, text, spans, tokenizer, dtype, log):
    """Documents, (n, 2) starts and ends in text, each ended by eot -> a file of bare ids and its entry in meta.json."""
    count, done, total, progress = 0, 0, int((spans[:, 1] - spans[:, 0]).sum()), paced(log)
    with open(path, 'wb') as file:
        for piece, last in pieces(text, spans):
            ids = tokenizer.encode(piece)
            if last and tokenizer.eot is not None:
                ids.append(tokenizer.eot)
            file.write(np.array(ids, dtype=dtype).tobytes())
            count, done = count + len(ids), done + len(piece.encode())
            progress(f'  {path.name}: {count:,} tokens, {done / total:.0%} of the text')
        file.flush()
        os.fsync(file.fileno())
    log(f'  {path.name}: {count:,} tokens of {total:,} bytes in {len(spans):,} documents')
    return {'path': path.name, 'tokens': count, 'documents': len(spans), 'text_bytes': total, **scan(path, dtype)}


def scan(path, dtype):
    """The size, SHA-256 and largest id of a token file, in blocks of 16 MB."""
    digest, largest, size, width = hashlib.sha256(), -1, 0, np.dtype(dtype).itemsize
    with open(path, 'rb') as file:
        while block := file.read(2**24):
            digest.update(block)
            size += len(block)
            ids = np.frombuffer(block, dtype=dtype, count=len(block) // width)
            largest = max(largest, int(ids.max(initial=0)))
    return {'size': size, 'sha256': digest.hexdigest(), 'largest_id': largest}


def write_json(path, value):
    """Whole or not at all, also over a file that is there."""
    temporary = path.with_name(f'.{path.name}.{secrets.token_hex(4)}')
    with open(temporary, 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_vocabulary(path, tokenizer):
    """vocab.json -> the entry of the file in meta.json."""
    write_json(path, tokenizer.state())
    return {'path': path.name, 'sha256': hashlib.sha256(path.read_bytes()).hexdigest()}


def write_meta(folder, meta):
    write_json(folder / 'meta.json', {**meta, 'checksum': checksum(meta)})


def checksum(meta):
    rest = {key: value for key, value in meta.items() if key != 'checksum'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def damaged(path, what):
    folder = path if path.is_dir() else path.parent
    return DataError(f'{path}: {what}; rm -r {shlex.quote(str(folder))} and start again to build it anew')


def read_meta(folder):
    """meta.json of a prepared folder -> dict. DataError if it is missing, damaged or of another format."""
    path = pathlib.Path(folder) / 'meta.json'
    try:
        meta = json.loads(path.read_bytes())
        if meta['checksum'] != checksum(meta):
            raise ValueError
    except FileNotFoundError:
        raise DataError(f'{path}: missing, so this is no prepared corpus (data.py makes one)') from None
    except OSError as error:
        raise damaged(path, f'cannot be read ({error.strerror})') from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise damaged(path, 'is damaged, or not what data.py writes') from None
    if meta['format'] != FORMAT:
        raise damaged(path, f'has format {meta["format"]}, this data.py reads {FORMAT}')
    return meta


def build(source, files, odd, closed, text_field, tokenizer, vocab_size, skip_bad_files, folder, log):
    """Files of text -> train.bin, val.bin and vocab.json in an empty folder; returns what meta.json says about them."""
    log(f'  reading {len(files):,} files')
    with tempfile.TemporaryFile(dir=folder) as file:
        documents = Documents(file, log)
        documents.problems += closed
        documents.read(files, text_field)
        problems = documents.problems
        if problems and not skip_bad_files:
            for problem in problems:
                log(f'  {problem}')
            more = f' (and {len(problems) - 1:,} more, named above)' if len(problems) > 1 else ''
            raise DataError(f'{problems[0]}{more}; data.py --skip_bad_files=True, with the same --dataset and '
                            '--tokenizer, leaves out what cannot be used')
        too_little = DataError(f'{source}: too little text to be split into training and validation; it takes two '
                               'documents, or one of several lines')
        if not documents.starts:
            raise too_little
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            parts, rule = split(text, np.array(documents.starts), np.array(documents.ends),
                                np.frombuffer(documents.digests, dtype=np.uint8).reshape(-1, 32))
            if min((spans[:, 1] - spans[:, 0]).min() for spans in parts.values()) == 0:
                raise too_little
            texts = (piece for piece, _ in pieces(text, parts['train']))
            vocabulary = make_tokenizer(tokenizer, vocab_size, texts, log)
            dtype = 'uint16' if vocabulary.vocab_size <= 2**16 else 'uint32'
            entries = {part: write_tokens(folder / f'{part}.bin', text, spans, vocabulary, dtype, log)
                       for part, spans in parts.items()}
    dropped = documents.odd['blank'] + len(documents.starts) - sum(map(len, parts.values()))
    if dropped:
        log(f'  left out: {dropped:,} documents blank or copies')
    remarks = documents.remarks() + odd
    if tokenizer == 'bpe' and vocabulary.vocab_size < vocab_size:
        remarks.append(f'The vocabulary has {vocabulary.vocab_size:,} tokens instead of {vocab_size:,}: '
                       'the training text holds no further pair twice.')
    return {'tokenizer': tokenizer, 'vocab_size': vocabulary.vocab_size, 'eot': vocabulary.eot, 'dtype': dtype,
            'split': rule, 'files_skipped': len(problems), 'documents_dropped': dropped, 'remarks': remarks, **entries,
            'vocabulary': write_vocabulary(folder / 'vocab.json', vocabulary)}


def id_type(path, vocab_size):
    """'uint16' or 'uint32' of a bare token file, by its vocabulary or its pattern. DataError if they cannot be ids."""
    head, size = np.fromfile(path, '<u2', count=2**21), path.stat().st_size
    halves = head[:len(head) // 4 * 4].reshape(-1, 2, 2)        # of 32-bit numbers, two by two: low, high
    low, high = halves[..., 0], halves[..., 1]
    pattern = len(low) and low.max() >= 16 and (high < 16).mean() > 0.99 and not high.all()     # of ids below 2^20
    wide = pattern or vocab_size > 2**16
    what = f'{size:,} bytes' if not size or size % (4 if wide else 2) else None
    if head[:2].tobytes() in (20240520 .to_bytes(4, 'little'), 20240801 .to_bytes(4, 'little')):
        what = "a file of llm.c's; tail -c +1025 takes off its header"
    elif wide and not halves[:, 1].any():
        what = '64-bit numbers'
    if what:
        raise DataError(f'{path}: not the array of uint16 or uint32 ids that nanoGPT writes, but {what}')
    return 'uint32' if wide else 'uint16'


def named_vocabulary(source, tokenizer, log):
    """What nanoGPT's tokens mean, by its meta.pkl or else the name -> (Tokenizer, []), or (None, [why]) if not had."""
    if (source / 'meta.pkl').exists():
        if tokenizer not in ('bpe', 'characters'):
            raise DataError(f'{source / "meta.pkl"} says that the tokens are characters, --tokenizer={tokenizer} '
                            'contradicts it; give --tokenizer=characters')
        return read_characters(source / 'meta.pkl'), []
    if tokenizer == 'characters':
        raise DataError(f'{source}: --tokenizer=characters takes the meta.pkl that nanoGPT writes beside its tokens')
    if tokenizer == 'bpe':
        return None, [f'No text and no bits per byte: the vocabulary of {source} is not known; '
                      'say --tokenizer=gpt2 if it is that one.']
    try:
        return make_tokenizer(tokenizer, 0, (), log), []
    except DataError as error:
        # another tokenizer is no way out for tokens that are given
        return None, [f'No text and no bits per byte: {str(error).partition(", or take")[0]}.']


def adopt(source, tokenizer, vocabulary, log):
    """nanoGPT's train.bin and val.bin, used where they lie -> what meta.json says about them, but for their meaning."""
    log(f'  the token files stay in {source}')
    entries = {}
    for path in (source / 'train.bin', source / 'val.bin'):
        try:
            dtype = id_type(path, vocabulary.vocab_size if vocabulary else 0)
            entry = scan(path, dtype)
        except OSError as error:
            raise DataError(f'{path}: cannot be read ({error.strerror})') from None
        entries[path.stem] = {'path': str(path), 'documents': None, 'text_bytes': None, 'dtype': dtype,
                              'tokens': entry['size'] // np.dtype(dtype).itemsize, **entry}
    if entries['train']['dtype'] != dtype:
        raise DataError(f'{source}: train.bin is made of {entries["train"]["dtype"]}, val.bin of {dtype}')
    if tokenizer == 'bytes' and entries['train']['largest_id'] <= 256:
        sample = np.fromfile(source / 'train.bin', dtype, count=2**20)
        if ((sample < 32) & ~np.isin(sample, [9, 10, 12, 13])).mean() > 0.1:
            raise DataError(f'{source}: as bytes, these tokens are no text; leave --tokenizer=bytes out')
    return {'dtype': dtype, 'split': 'as given', 'files_skipped': 0, 'documents_dropped': 0, **entries}


def explained(meta, tokenizer, vocabulary, remarks, folder):
    """meta of nanoGPT's tokens with what they mean; writes vocab.json. DataError for ids beyond the vocabulary."""
    largest = max(meta[part]['largest_id'] for part in ('train', 'val'))
    V = vocabulary.vocab_size if vocabulary else 50257 if tokenizer == 'gpt2' else min(largest + 1, 2**20)
    if largest >= V:
        raise DataError(f'{meta["train"]["path"]} or val.bin: id {largest:,} is beyond the {V:,} ids of '
                        f'--tokenizer={tokenizer}')
    name = vocabulary.name if vocabulary else 'unknown' if tokenizer == 'bpe' else tokenizer
    return {**meta, 'tokenizer': name, 'vocab_size': V, 'eot': vocabulary and vocabulary.eot, 'remarks': remarks,
            'vocabulary': write_vocabulary(folder / 'vocab.json', vocabulary) if vocabulary else None}


def prepare(dataset, tokenizer, vocab_size, root=None, log=say, text_field='text', skip_bad_files=False):
    """Makes sure that the token files are there and up to date -> their folder, a pathlib.Path. Raises DataError.

    dataset: stdlib or a path. tokenizer: bpe, bytes or a name of tiktoken's; vocab_size, eot included: bpe's.
    root: where prepared folders lie, default data/ beside this file. log: gets lines of progress.
    text_field: of rows. skip_bad_files: leave out files and rows that cannot be read, instead of refusing.
    Builds in a folder aside, flushed and renamed into place: a crash leaves nothing half made, and of two
    processes that build at once one finds the other's result and throws its own away. No folder is ever replaced.
    """
    check_tokenizer(tokenizer, vocab_size)
    kind, source, name = locate(dataset)
    if kind == 'prepared':
        meta = read_meta(source)
        if tokenizer != meta['tokenizer']:
            raise DataError(f'{source} was prepared with --tokenizer={meta["tokenizer"]}, '
                            f'--tokenizer={tokenizer} contradicts it')
        if tokenizer == 'bpe' and vocab_size != meta['vocab_size']:
            log(f'{source} has a vocabulary of {meta["vocab_size"]:,} tokens, whatever --vocab_size says')
        return source
    if tokenizer == 'characters' and kind != 'tokens':
        raise DataError("--tokenizer=characters is for nanoGPT's token files with a meta.pkl; take bytes or bpe")
    files, odd, closed = corpus_files(kind, source)
    label = tokenizer + str(vocab_size) * (tokenizer == 'bpe' and kind != 'tokens')
    want = {'format': FORMAT, 'dataset': name, 'label': label, 'pattern': PATTERN,
            'fingerprint': fingerprint(source, files),
            'text_field': text_field if any(ending(file) in ROW_ENDINGS for file in files) else None,
            'source': str(source) if kind == 'tokens' else None}
    root = pathlib.Path(root or pathlib.Path(__file__).resolve().parent / 'data')
    folder = root / f'{name}-{label}-{checksum(want)[:8]}'
    temporary = root / f'.{folder.name}.{os.getpid()}-{secrets.token_hex(4)}'
    vocabulary, remarks = None, []
    try:
        meta = read_meta(folder) if folder.exists() else None
        if meta and (meta['vocabulary'] or tokenizer == 'bpe'):
            return folder
        if kind == 'tokens':
            vocabulary, remarks = named_vocabulary(source, tokenizer, log)
        if meta:                                                # prepared when the vocabulary could not be had
            if vocabulary:
                write_meta(folder, explained(meta, tokenizer, vocabulary, remarks, folder))
            return folder
        log(f'preparing {folder}')
        for left in root.glob(f'.{name}-{label}-*'):            # by processes killed a day ago or earlier
            if left.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(left, ignore_errors=True)
        if earlier := sorted(root.glob(f'{name}-{label}-*')):
            log(f'  not the text of before; its tokens stay in {earlier[0]}, for runs that used them')
        temporary.mkdir(parents=True)
        if kind == 'tokens':
            meta = explained(adopt(source, tokenizer, vocabulary, log), tokenizer, vocabulary, remarks, temporary)
        else:
            skip_bad_files |= kind == 'stdlib'
            meta = build(source, files, odd, closed, text_field, tokenizer, vocab_size, skip_bad_files, temporary, log)
        for remark in meta['remarks']:
            log(f'  {remark}')
        write_meta(temporary, {**want, **meta})
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():
                raise
            read_meta(folder)                                   # another process was first
        return folder
    except OSError as error:
        raise DataError(f'{folder}: cannot be written ({error.strerror or error}), nothing half made is '
                        f'left; make room or give another place with --data_root=FOLDER') from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_tokenizer(folder):
    """The tokenizer of a prepared folder. DataError if its vocabulary is damaged or not known."""
    folder = pathlib.Path(folder)
    meta, path = read_meta(folder), folder / 'vocab.json'
    if meta['vocabulary'] is None:
        raise DataError(f'{folder}: the vocabulary of these tokens is not known; name it, as with --tokenizer=gpt2')
    try:
        content = path.read_bytes()
    except OSError as error:
        raise damaged(path, f'cannot be read ({error.strerror})') from None
    if hashlib.sha256(content).hexdigest() != meta['vocabulary']['sha256']:
        raise damaged(path, 'does not agree with the SHA-256 in meta.json')
    return Tokenizer.from_state(json.loads(content))


# ---------------------------------------------------------------------------------------------------------------------
# Batches

class Corpus:
    """The verified token files of a prepared folder: .train and .val (ids, memory-mapped), .meta, batches.

    .tokenizer: a Tokenizer, or None where the vocabulary is not known; .tokenizer_name: what the tokens really are.
    .remarks: what a user should know of the preparation, a list of sentences, [] if all went as asked.
    max_train_tokens, max_val_tokens: use only the first so many, 0 = all. block_size: tokens of context.
    Raises DataError: size, SHA-256 or ids disagree with meta.json, or a split is shorter than block_size + 1.
    """

    def __init__(self, folder, max_train_tokens=0, max_val_tokens=0, block_size=512):
        self.folder, self.block_size = pathlib.Path(folder), block_size
        self.meta = read_meta(self.folder)
        self.vocab_size, self.eot = self.meta['vocab_size'], self.meta['eot']
        self.tokenizer_name, self.remarks = self.meta['tokenizer'], self.meta.get('remarks', [])
        self.tokenizer = load_tokenizer(self.folder) if self.meta['vocabulary'] else None
        self.caps = {'train': max_train_tokens, 'val': max_val_tokens}
        self.train, self.val = self._open('train'), self._open('val')
        self._permutation = None, None

    def _open(self, part):
        entry, cap, dtype, V = self.meta[part], self.caps[part], self.meta['dtype'], self.vocab_size
        path = self.folder / entry['path']                      # nanoGPT's own files: an absolute path
        try:
            found = scan(path, dtype)
            if found['size'] != entry['size']:
                sizes = f'{found["size"]:,} bytes, meta.json says {entry["size"]:,}'
                raise damaged(self.folder, f'{path.name} has {sizes}')
            if found['sha256'] != entry['sha256']:
                raise damaged(self.folder, f'the SHA-256 of {path.name} is not the one in meta.json')
            if found['largest_id'] >= V:
                raise damaged(self.folder, f'{path.name} has id {found["largest_id"]}, there are {V} tokens')
            tokens = np.memmap(path, dtype=dtype, mode='r')
        except OSError as error:
            raise damaged(self.folder, f'{path.name} cannot be read ({error.strerror})') from None
        if cap < 0:
            raise DataError(f'--max_{part}_tokens={cap}: 0 (all) or more')
        few = f'cannot fill one context of --block_size={self.block_size} plus one'
        if len(tokens) <= self.block_size:
            raise DataError(f'{self.folder}: {len(tokens):,} {part} tokens {few}; take a smaller one or more text')
        if 0 < cap <= self.block_size:
            raise DataError(f'--max_{part}_tokens={cap} {few}; take more, or 0 for all {len(tokens):,}')
        return tokens[:cap] if cap else tokens

    def batch(self, seed, step, batch_size):
        """Update number `step` -> (x, y), int64 (batch_size, block_size) each, y being x one token on.

        A pure function of (seed, step): windows are numbered through the whole run, and window i is number
        i % n of epoch i // n. So there is no state to save, resuming is exact, and whoever computes a batch,
        in whatever micro-batches or processes, gets the same one. An epoch lays n windows side by side from a
        random offset and goes through them in random order: each token is a target once an epoch (but for
        those the offset leaves over at the two ends) instead of Poisson-many times, as with random positions,
        and the offset puts it at another place in its window next time.
        """
        n = max(1, (len(self.train) - self.block_size) // self.block_size)
        starts = np.empty(batch_size, dtype=np.int64)
        for row in range(batch_size):
            epoch, number = divmod(step * batch_size + row, n)
            if self._permutation[0] != (seed, epoch):
                rng = np.random.default_rng([seed, epoch])
                offset = rng.integers(len(self.train) - n * self.block_size)
                self._permutation = (seed, epoch), offset + self.block_size * rng.permutation(n)
            starts[row] = self._permutation[1][number]
        window = self.train[starts[:, None] + np.arange(self.block_size + 1)].astype(np.int64)  # (B, T + 1)
        return window[:, :-1], window[:, 1:]

    def val_windows(self):
        """(x, y), int64 (n_windows, block_size) each: side by side over the whole split, always the same.

        Every token but the first is a target once; the last window is filled up with x = 0, y = -1 (ignore).
        """
        n = math.ceil((len(self.val) - 1) / self.block_size)
        x, y = np.zeros(n * self.block_size, dtype=np.int64), np.full(n * self.block_size, -1, dtype=np.int64)
        x[:len(self.val) - 1], y[:len(self.val) - 1] = self.val[:-1], self.val[1:]
        return x.reshape(n, self.block_size), y.reshape(n, self.block_size)

    def _count(self, tokens):
        blocks = (tokens[i:i + 2**24] for i in range(0, len(tokens), 2**24))
        return sum(np.bincount(block, minlength=self.vocab_size) for block in blocks)

    def describe(self):
        """The data section of result.json. Losses: what knowing little costs, in nats per validation target:

        uniform_loss ln V, a guess over the vocabulary; unigram_loss the cross-entropy under the frequencies
        of the training tokens used, one added to each. val_bytes: of the targets' text. val_text_sha256: of the text
        of all validation tokens used, equal whatever the tokenizer. What needs the vocabulary is None without it.
        """
        counts, targets, text = self._count(self.train) + 1.0, self._count(self.val[1:]), hashlib.sha256()
        for i in range(0, len(self.val) if self.tokenizer else 0, 2**20):
            text.update(self.tokenizer.decode_bytes(self.val[i:i + 2**20].tolist()))
        return {'dataset': self.meta['dataset'], 'tokenizer': self.tokenizer_name,
                'vocab_size': self.vocab_size,
                'train_tokens': len(self.train), 'val_tokens': len(self.val),
                'val_bytes': int(targets @ self.tokenizer.token_bytes) if self.tokenizer else None,
                'train_sha256': self.meta['train']['sha256'], 'val_sha256': self.meta['val']['sha256'],
                'vocab_sha256': self.tokenizer.sha256() if self.tokenizer else None,
                'val_text_sha256': text.hexdigest() if self.tokenizer else None,
                'max_train_tokens': self.caps['train'], 'max_val_tokens': self.caps['val'],
                'uniform_loss': math.log(self.vocab_size),
                'unigram_loss': float(-(targets @ np.log(counts / counts.sum())) / targets.sum()),
                'remarks': self.remarks}


if __name__ == '__main__':
    from configurator import configure, fail
    # -----------------------------------------------------------------------------------------------------------------
    # What to prepare
    dataset = 'stdlib'      # stdlib (this Python's standard library, about 12 MB), a text file, a folder of text files
                            # (.txt .md .py .jsonl .parquet, .txt.gz ...), or nanoGPT's with train.bin and val.bin
    tokenizer = 'bpe'       # bpe (trained on the training split), bytes, gpt2 or another tiktoken name (a download)
    vocab_size = 4096       # tokens in the vocabulary that bpe trains, the end of text included
    text_field = 'text'     # of the rows of .jsonl and .parquet: the field with the document
    skip_bad_files = False  # leave out files and rows that cannot be read, instead of refusing the corpus
    data_root = ''          # where token files are kept; empty: the folder data/ beside data.py
    # -----------------------------------------------------------------------------------------------------------------
    sys.stdout.reconfigure(errors='backslashreplace')
    configure(globals())
    try:
        folder = prepare(dataset, tokenizer, vocab_size, data_root, say, text_field, skip_bad_files)
        corpus = Corpus(folder, block_size=1)
    except DataError as error:
        fail(error)
    except KeyboardInterrupt:
        fail('interrupted, nothing half made is left')
    facts = corpus.describe()
    say(f'{folder} is ready and verified')
    for part in ('train', 'val'):
        text_bytes = corpus.meta[part]['text_bytes']
        ratio = f', {text_bytes / facts[f"{part}_tokens"]:.2f} bytes each' if text_bytes else ''
        say(f'  {part:5} {facts[f"{part}_tokens"]:,} tokens{ratio}')
    say(f'  loss of a uniform guess {facts["uniform_loss"]:.4f}, of unigram frequencies {facts["unigram_loss"]:.4f}')
    for remark in corpus.remarks:
        say(remark)
