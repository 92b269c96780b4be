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
import platform
import re
import shlex
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

from configurator import configure, fail, say
from documents import ROW_ENDINGS, ending, list_files, paced, read_documents
from tokenizer import PATTERN, DataError, Tokenizer, check_tokenizer, checksum, make_tokenizer, read_characters

FORMAT = 1                       # of meta.json
VAL_SHARE = 0.05                 # of the bytes
FINGERPRINTED = 64e6             # bytes of a corpus that are read, at every start, to see whether it has changed

# Of the standard library, what names begin with that are passed over: tests, and what this machine put there
NOT_STDLIB = r'\.|(test|tests|idle_test|site-packages|dist-packages|__pycache__)$|config-|_sysconfigdata|(site|user)customize'


# ---------------------------------------------------------------------------------------------------------------------
# Text

def locate(dataset):
    """--dataset -> kind (stdlib, file, folder, tokens: nanoGPT's, prepared: by us), path, name, files, remarks on the files."""
    if dataset == 'stdlib':
        path = Path(sysconfig.get_path('stdlib'))
        return 'stdlib', path, f'stdlib-{platform.python_version()}', list_files(path, ('.py',), NOT_STDLIB)[0], []
    try:
        path = Path(dataset or ' ').expanduser().resolve(strict=True)         # Path('') is the folder we are in
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f'--dataset={dataset}: {getattr(error, "strerror", None) or error} (looked from {os.getcwd()}); '
                        'give stdlib, a text file, a folder of them, or a folder with train.bin and val.bin') from None
    name = re.sub(r'[^\w.-]', '_', path.name.encode('utf-8', 'replace').decode())[-80:]
    has = {file for file in ('train.bin', 'val.bin', 'vocab.json', 'meta.json') if os.path.exists(path / file)}
    # meta.json alone: of nanoGPT's tokens, which are used where they lie
    if 'meta.json' in has and (len(has) > 1 or len(list(path.glob('[!.]*'))) == 1):
        return 'prepared', path, name, [], []
    if has >= {'train.bin', 'val.bin'}:
        return 'tokens', path, name, [path / file for file in ('train.bin', 'val.bin', 'meta.pkl') if (path / file).exists()], []
    if path.is_dir():
        return 'folder', path, name, *list_files(path)
    return 'file', path, name, [path], []


def fingerprint(path, files):
    """Changes whenever a file is added, removed, resized or written to, by size and time: archives may give two texts one
    time, so the first files, up to FINGERPRINTED bytes, are read as well."""
    base, digest, left = path if path.is_dir() else path.parent, hashlib.sha256(), FINGERPRINTED
    for file in files:
        try:
            state = f'{file.stat().st_size} {file.stat().st_mtime_ns}'
            left -= file.stat().st_size
            if left >= 0:
                state += hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError:
            state = 'unreadable'
        digest.update(os.fsencode(f'{file.relative_to(base).as_posix()} {state}\n'))
    return digest.hexdigest()


def split(text, spans):
    """Documents text[start:end] of the spans, (n, 2) -> {'train': spans, 'val': spans}.

    In their order, each document that still fits into 5% of the bytes goes to val. A lone one is cut where its last 5%
    begin, if possible at a line end in its last tenth.
    """
    if len(spans) == 1:
        start, end = spans[0].tolist()
        at = start + int((end - start) * (1 - VAL_SHARE))
        line = text.find(b'\n', at, end - 1) + 1 or text.rfind(b'\n', 2 * at - end, at) + 1
        while not line and text[at] & 0xC0 == 0x80:             # not within a character
            at -= 1
        return {'train': np.array([[start, line or at]]), 'val': np.array([[line or at, end]])}
    sizes = np.diff(spans)[:, 0]
    val, room = np.zeros(len(spans), dtype=bool), VAL_SHARE * sizes.sum()
    for i, size in enumerate(sizes):
        if size <= room:
            val[i], room = True, room - size
    if not val.any():
        val[sizes.argmin()] = True
    return {'train': spans[~val], 'val': spans[val]}


def pieces(text, spans, what, log):
    """The documents' text, about a megabyte at a time -> (text, whether it ends a document).

    It is cut in front of a blank, which no chunk of a tokenizer's pattern goes over, or where none is near, of a line that
    is not indented.
    """
    blank, line_end = re.compile(rb'[!-~](?= )'), re.compile(rb'\n(?=\S)')
    done, total, progress = 0, np.diff(spans).sum(), paced(log)
    for start, end in map(np.ndarray.tolist, spans):
        while start < end:
            at = start + 2**20
            found = blank.search(text, at, min(at + 2**16, end)) or line_end.search(text, at, end)
            stop = found.end() if found else end
            yield text[start:stop].decode(), stop == end
            done, start = done + stop - start, stop
            progress(f'  {what}: {done / total:.0%} of the text')


# ---------------------------------------------------------------------------------------------------------------------
# Prepared folders

def write_json(path, value):
    """Whole or not at all, also over a file that is there -> its entry in meta.json."""
    content, aside = json.dumps(value, indent=1).encode(), path.with_name(f'.{path.name}.{os.getpid()}')
    aside.write_bytes(content)
    os.replace(aside, path)
    return {'path': path.name, 'sha256': hashlib.sha256(content).hexdigest()}


def write_tokens(path, text, spans, tokenizer, dtype, log):
    """Documents, (n, 2) starts and ends in text, each ended by eot -> a file of bare ids and its entry in meta.json."""
    with open(path, 'wb') as file:
        for piece, last in pieces(text, spans, path.name, log):
            ids = tokenizer.encode(piece) + [tokenizer.eot] * (last and tokenizer.eot is not None)
            file.write(np.array(ids, dtype).tobytes())
    size, found = int(np.diff(spans).sum()), scan(path, dtype)
    log(f'  {path.name}: {found["tokens"]:,} tokens of {size:,} bytes in {len(spans):,} documents')
    return {'path': path.name, 'documents': len(spans), 'text_bytes': size, **found}


def scan(path, dtype='uint8'):
    """What can be read off a file of token ids, in blocks of 16 MB."""
    digest, largest, size, width = hashlib.sha256(), -1, 0, np.dtype(dtype).itemsize
    with open(path, 'rb') as file:
        while block := file.read(2**24):
            digest.update(block)
            size += len(block)
            largest = max(largest, int(np.frombuffer(block, dtype, len(block) // width).max(initial=0)))
    return {'tokens': size // width, 'sha256': digest.hexdigest(), 'largest_id': largest}


def write_meta(folder, meta):
    write_json(folder / 'meta.json', {**meta, 'checksum': checksum(meta)})


def read_meta(folder):
    """meta.json of a prepared folder -> dict. DataError if it is missing, damaged or of another format."""
    try:
        meta = json.loads((folder / 'meta.json').read_bytes())
        if meta.pop('checksum') != checksum(meta):
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise damaged(folder, 'meta.json is missing, damaged, or not what data.py writes') from None
    if meta['format'] != FORMAT:
        raise damaged(folder, f'meta.json has format {meta["format"]}, this data.py reads {FORMAT}')
    return meta


def verified(folder, entry):
    """The path of a file that meta.json describes in an entry. DataError if it is not what was written."""
    path = folder / entry['path']                               # of nanoGPT's own files: an absolute path
    try:
        if scan(path)['sha256'] == entry['sha256']:
            return path
    except OSError as error:
        raise damaged(folder, f'{path.name} cannot be read ({error.strerror})') from None
    raise damaged(folder, f'{path.name} does not agree with the SHA-256 in meta.json')


def damaged(folder, what):
    name = shlex.quote(str(folder))                             # not rm -r: it may be a folder of somebody else's
    return DataError(f'{folder}: {what}; mv {name} {name}.damaged and start again to build it anew')


def build(source, files, text_field, tokenizer, vocab_size, skip_bad_files, folder, log):
    """Files of text -> train.bin, val.bin and vocab.json in an empty folder; returns what meta.json says about them."""
    vocabulary = None if tokenizer == 'bpe' else make_tokenizer(tokenizer, 0, (), log)      # fails before hours of reading
    with tempfile.TemporaryFile(dir=folder) as spool:
        spans, remarks = read_documents(files, text_field, skip_bad_files, spool, log)
        if np.diff(spans).sum() < 5:               # bytes: maybe a single character
            raise DataError(f'{source}: too little text to be split into training and validation')
        spool.flush()
        with mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ) as text:
            parts = split(text, spans)
            if tokenizer == 'bpe':
                texts = (piece for piece, _ in pieces(text, parts['train'], 'vocabulary', log))
                vocabulary = make_tokenizer(tokenizer, vocab_size, texts, log)
            dtype = 'uint16' if vocabulary.vocab_size <= 2**16 else 'uint32'
            entries = {part: write_tokens(folder / f'{part}.bin', text, parts[part], vocabulary, dtype, log)
                       for part in parts}
    if tokenizer == 'bpe' and vocabulary.vocab_size < vocab_size:
        remarks.append(f'The vocabulary has {vocabulary.vocab_size:,} tokens instead of {vocab_size:,}: '
                       'the training text holds no further pair twice.')
    return {'tokenizer': tokenizer, 'vocab_size': vocabulary.vocab_size, 'eot': vocabulary.eot, 'dtype': dtype,
            'remarks': remarks, **entries, 'vocabulary': write_json(folder / 'vocab.json', vocabulary.state())}


def id_type(path, vocab_size):
    """'uint16' or 'uint32' of a bare token file, by its vocabulary or its pattern. DataError if they cannot be ids."""
    head, size = np.fromfile(path, '<u4', count=2**20), path.stat().st_size
    low, high = head & 0xFFFF, head >> 16
    pattern = len(head) and low.max() >= 16 and (high < 16).mean() > 0.99 and not high.all()    # of ids below 2^20
    pattern = pattern and not 0 < vocab_size <= head.max()      # 16-bit ids of few symbols, almost all below 16, look like it
    wide, what = pattern or vocab_size > 2**16, None
    if set(head[:1]) & {20240520, 20240801}:
        what = "a file of llm.c's; tail -c +1025 takes off its header"
    elif wide and not head[1::2].any():
        what = '64-bit numbers'
    elif not size or size % (4 if wide else 2):
        what = f'{size:,} bytes'
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
    if tokenizer == 'bpe':
        return None, [f'No text and no bits per byte: the vocabulary of {source} is not known; '
                      'say --tokenizer=gpt2 if it is that one.']
    try:
        return make_tokenizer(tokenizer, 0, (), log), []
    except DataError as error:
        return None, [f'No text and no bits per byte: {error}.']


def adopt(source, tokenizer, vocabulary, remarks, folder):
    """nanoGPT's train.bin and val.bin, used where they lie -> what meta.json says about them; writes vocab.json."""
    paths, V = [source / 'train.bin', source / 'val.bin'], vocabulary.vocab_size if vocabulary else 0
    try:
        dtype, other = [id_type(path, V) for path in paths]
        entries = {path.stem: {'path': str(path), **scan(path, dtype)} for path in paths}
    except OSError as error:
        raise DataError(f'{error.filename} cannot be read ({error.strerror})') from None
    if other != dtype:
        raise DataError(f'{source}: train.bin is made of {dtype}, val.bin of {other}')
    largest = max(entry['largest_id'] for entry in entries.values())
    V = V or (50257 if tokenizer == 'gpt2' else min(largest + 1, 2**20))
    if largest >= V:
        raise DataError(f'{paths[0]} or val.bin: id {largest:,} is beyond the {V:,} ids of --tokenizer={tokenizer}')
    if tokenizer == 'bytes':
        sample = np.fromfile(paths[0], dtype, count=2**20)
        if ((sample < 32) & ~np.isin(sample, [9, 10, 12, 13])).mean() > 0.1:
            raise DataError(f'{source}: as bytes, these tokens are no text; leave --tokenizer=bytes out')
    return {'tokenizer': vocabulary.name if vocabulary else 'unknown' if tokenizer == 'bpe' else tokenizer,
            'vocab_size': V, 'eot': vocabulary and vocabulary.eot, 'dtype': dtype, 'remarks': remarks, **entries,
            'vocabulary': vocabulary and write_json(folder / 'vocab.json', vocabulary.state())}


def prepare(dataset, tokenizer, vocab_size, root=None, log=say, text_field='text', skip_bad_files=False):
    """Makes sure that the token files are there and up to date -> their folder, a Path. Raises DataError.

    dataset: stdlib or a path. tokenizer: bpe, bytes or a name of tiktoken's; vocab_size, eot included: bpe's.
    root: where prepared folders lie, default data/ beside this file. log: gets lines of progress.
    text_field: of rows. skip_bad_files: leave out files and rows that cannot be read, instead of refusing.
    Builds in a folder aside, renamed into place: a crash leaves nothing half made, and of two processes that build at
    once one finds the other's result and throws its own away. No folder is ever replaced.
    """
    check_tokenizer(tokenizer, vocab_size)
    kind, source, name, files, remarks = locate(dataset)
    if kind == 'prepared':
        meta = read_meta(source)
        if tokenizer not in (meta['tokenizer'], meta['label']):         # what the tokens are, what was asked for
            raise DataError(f'{source} was prepared with --tokenizer={meta["tokenizer"]}, '
                            f'--tokenizer={tokenizer} contradicts it')
        if tokenizer == 'bpe' and vocab_size != meta['vocab_size']:
            log(f'{source} has a vocabulary of {meta["vocab_size"]:,} tokens, whatever --vocab_size says')
        return source
    tokens = kind == 'tokens'
    if tokenizer == 'characters' and source / 'meta.pkl' not in files:
        raise DataError("--tokenizer=characters is for nanoGPT's token files with the meta.pkl that it writes beside them")
    label = tokenizer + str(vocab_size) * (tokenizer == 'bpe' and not tokens)
    want = {'format': FORMAT, 'dataset': name, 'label': label, 'pattern': PATTERN,
            'fingerprint': fingerprint(source, files),
            'text_field': text_field if any(ending(file) in ROW_ENDINGS for file in files) else None,
            'source': str(source) if tokens else None}
    root = Path(os.path.expanduser(root or Path(__file__).resolve().parent / 'data'))
    folder = root / f'{name}-{label}-{checksum(want)[:8]}'
    try:
        meta = read_meta(folder) if folder.exists() else None
        if meta and (meta['vocabulary'] or tokenizer == 'bpe'):
            return folder
        if tokens:
            vocabulary, remarks = named_vocabulary(source, tokenizer, log)
        if meta:                                                # prepared when the vocabulary could not be had
            if vocabulary:
                write_meta(folder, {**want, **adopt(source, tokenizer, vocabulary, remarks, folder)})
            return folder
        log(f'preparing {folder}')
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix='.building-') as aside:
            built = Path(aside, folder.name)
            built.mkdir()
            if tokens:
                meta = adopt(source, tokenizer, vocabulary, remarks, built)
            else:
                skip_bad_files |= kind == 'stdlib'
                meta = build(source, files, text_field, tokenizer, vocab_size, skip_bad_files, built, log)
                meta['remarks'] += remarks
            for remark in meta['remarks']:
                log(f'  {remark}')
            write_meta(built, {**want, **meta})
            try:
                os.rename(built, folder)
            except OSError:                                     # another process was first
                if not folder.exists():
                    raise
        return folder
    except OSError as error:
        raise DataError(f'{folder} cannot be made ({error}), nothing half made is left; make room or give another place '
                        'with --data_root=FOLDER') from None


# ---------------------------------------------------------------------------------------------------------------------
# Batches

class Corpus:
    """The verified token files of a prepared folder: .train and .val (ids, memory-mapped), .meta, batches.

    .tokenizer: a Tokenizer, or None where the vocabulary is not known; .tokenizer_name: what the tokens really are.
    .remarks: what a user should know of the preparation, a list of sentences, [] if all went as asked.
    max_train_tokens, max_val_tokens: use only the first so many, 0 = all. block_size: tokens of context.
    Raises DataError: a file does not agree with meta.json, or a split is shorter than block_size + 1.
    """

    def __init__(self, folder, max_train_tokens=0, max_val_tokens=0, block_size=512):
        self.folder, self.block_size = Path(folder), block_size
        self.meta = meta = read_meta(self.folder)
        self.vocab_size, self.tokenizer_name, self.remarks = meta['vocab_size'], meta['tokenizer'], meta['remarks']
        self.tokenizer = None
        if meta['vocabulary']:
            self.tokenizer = Tokenizer.from_state(json.loads(verified(self.folder, meta['vocabulary']).read_bytes()))
        self.caps = {'train': max_train_tokens, 'val': max_val_tokens}
        self.train, self.val = self._open('train'), self._open('val')
        self._permutation = None, None

    def _open(self, part):
        tokens, cap = np.memmap(verified(self.folder, self.meta[part]), self.meta['dtype'], 'r'), self.caps[part]
        few = f'cannot fill one context of --block_size={self.block_size} plus one'
        if len(tokens) <= self.block_size:
            raise DataError(f'{self.folder}: {len(tokens):,} {part} tokens {few}; take a smaller one or more text')
        if cap and cap <= self.block_size:                      # or negative: not all but so many
            raise DataError(f'--max_{part}_tokens={cap} {few}; take more, or 0 for all {len(tokens):,}')
        return tokens[:cap or None]

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

    def val_windows(self, rows):
        """[(x, y), ...], int64 (`rows` or fewer, block_size) each: side by side over the whole split, always the same.

        Every token but the first is a target once. A last window that is not full comes by itself, as long as it is.
        """
        ids = self.val.astype(np.int64)
        full = (len(ids) - 1) // self.block_size * self.block_size          # targets in full windows
        x, y = (a.reshape(-1, self.block_size) for a in (ids[:full], ids[1:full + 1]))
        parts = [(x[i:i + rows], y[i:i + rows]) for i in range(0, len(x), rows)]
        return parts + [(ids[None, full:-1], ids[None, full + 1:])] * (full < len(ids) - 1)

    def _count(self, tokens):
        blocks = (tokens[i:i + 2**24] for i in range(0, len(tokens), 2**24))
        return sum(np.bincount(block, minlength=self.vocab_size) for block in blocks)

    def describe(self):
        """The data section of result.json. Losses: what knowing little costs, in nats per validation target:

        uniform_loss ln V, a guess over the vocabulary; unigram_loss the cross-entropy under the frequencies
        of the training tokens used, one added to each. val_bytes: of the targets' text. val_text_sha256: of the text
        of all validation tokens used, equal whatever the tokenizer. What needs the vocabulary is None without it.
        """
        counts, targets = self._count(self.train) + 1.0, self._count(self.val[1:])
        val_bytes = vocab_sha256 = val_text_sha256 = None
        if self.tokenizer:
            val_bytes = int(targets @ [len(token or b'') for token in self.tokenizer.tokens])
            vocab_sha256, text = self.tokenizer.sha256(), hashlib.sha256()
            for i in range(0, len(self.val), 2**20):
                text.update(self.tokenizer.decode_bytes(self.val[i:i + 2**20].tolist()))
            val_text_sha256 = text.hexdigest()
        return {'dataset': self.meta['dataset'], 'tokenizer': self.tokenizer_name, 'vocab_size': self.vocab_size,
                'train_tokens': len(self.train), 'val_tokens': len(self.val), 'val_bytes': val_bytes,
                'train_sha256': self.meta['train']['sha256'], 'val_sha256': self.meta['val']['sha256'],
                'vocab_sha256': vocab_sha256, 'val_text_sha256': val_text_sha256,
                'max_train_tokens': self.caps['train'], 'max_val_tokens': self.caps['val'],
                'uniform_loss': math.log(self.vocab_size),
                'unigram_loss': float(-(targets @ np.log(counts / counts.sum())) / targets.sum()),
                'remarks': self.remarks}


if __name__ == '__main__':
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
    configure(globals())
    try:
        folder = prepare(dataset, tokenizer, vocab_size, data_root, say, text_field, skip_bad_files)
        corpus = Corpus(folder, block_size=1)
    except DataError as error:
        fail(error)
    except KeyboardInterrupt:
        fail('interrupted, nothing half made is left')
    say(f'{folder} is ready and verified: {len(corpus.train):,} tokens for training, {len(corpus.val):,} for validation')
    for remark in corpus.remarks:
        say(remark)
