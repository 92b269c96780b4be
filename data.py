"""Text -> tokens -> batches. `python data.py --dataset=... --tokenizer=...` prepares token files ahead.

    corpus      stdlib (the standard library of this Python), a text file, a folder of text files, or a folder
                with nanoGPT's train.bin and val.bin, which are used where they lie
    tokenizer   bpe (trained on the training split), bytes, gpt2 or another name tiktoken knows: tokenizer.py

prepare() writes data/<dataset>-<tokenizer>/: train.bin and val.bin (bare token ids), vocab.json, meta.json.
Corpus() verifies them and serves batches. Documents are split before anything is learned from them, be it the
vocabulary: no text of the validation split, nor a copy of it, is ever seen in training.
"""

import hashlib
import json
import math
import os
import pathlib
import platform
import re
import secrets
import shlex
import shutil
import sysconfig
import time

import numpy as np

from tokenizer import EOT, PATTERN, DataError, Tokenizer, check_tokenizer, make_tokenizer

FORMAT = 1                       # of meta.json; a folder of an older format is built again
VAL_SHARE = 0.05                 # of the bytes
TEXT_ENDINGS = ('.txt', '.md', '.rst', '.tex', '.html',
                '.py', '.c', '.h', '.cpp', '.js', '.ts', '.java', '.go', '.rs')


# ---------------------------------------------------------------------------------------------------------------------
# Corpora

def locate(dataset):
    """--dataset -> (kind, path, name): stdlib, file, folder or tokens (nanoGPT's); name heads our folder."""
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
    if (path / 'train.bin').is_file() and (path / 'val.bin').is_file():
        kind = 'tokens'
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return kind, path, re.sub(r'[^\w.-]', '_', path.name.encode('utf-8', 'replace').decode()) + f'-{digest}'


def list_files(kind, path):
    """The files of a corpus, sorted. Of the standard library: no tests, nothing this machine put there."""
    if kind == 'file':
        return [path]
    if kind == 'tokens':
        return [path / 'train.bin', path / 'val.bin']
    endings, skip, left_out, files = TEXT_ENDINGS, set(), ('.',), []
    if kind == 'stdlib':
        endings = ('.py',)
        skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
        left_out = ('.', 'config-', '_sysconfigdata', 'sitecustomize', 'usercustomize')
    for parent, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(left_out)]
        files += [pathlib.Path(parent, name) for name in names
                  if name.endswith(endings) and not name.startswith(left_out)]
    if not files:
        raise DataError(f'{path}: no text files in it; endings read are {" ".join(endings)}')
    return sorted(files)


def fingerprint(path, files):
    """Changes whenever a file is added, removed, resized or written to; reads no contents."""
    base, digest = path if path.is_dir() else path.parent, hashlib.sha256()
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise DataError(f'{file}: cannot be read ({error.strerror})') from None
        digest.update(os.fsencode(f'{file.relative_to(base).as_posix()} {stat.st_size} {stat.st_mtime_ns}\n'))
    return digest.hexdigest()


def read_documents(kind, files):
    """-> (list of texts, number of files skipped): a file is a document, or a lone file may hold several."""
    documents, skipped = [], 0
    for file in files:
        try:
            documents.append(file.read_bytes().decode('utf-8'))
        except OSError as error:
            raise DataError(f'{file}: cannot be read ({error.strerror})') from None
        except UnicodeDecodeError as error:
            if kind != 'stdlib':
                raise DataError(f'{file}: not UTF-8 text (at byte {error.start:,}); convert it '
                                f'(iconv -f latin1 -t utf-8) or leave it out') from None
            skipped += 1
    if kind == 'file':
        documents = re.split(rf'(?m)^{re.escape(EOT)}[ \t\r]*(?:\n|\Z)', documents[0])
    return documents, skipped


def split(documents):
    """list of texts -> (train, val, rule in words, number dropped).

    Copies and blank documents are dropped: a copy could end up on either side. The order is that of the
    SHA-256 of the text: arbitrary, so that the first N tokens are a fair sample, yet the same everywhere. In
    this order documents go to val while they fit into 5% of the bytes. A lone one is cut at a line end.
    """
    unique = {hashlib.sha256(text.encode()).digest(): text for text in documents if text.strip()}
    dropped = len(documents) - len(unique)
    if len(unique) == 1:
        text = next(iter(unique.values()))
        cut = int(len(text) * (1 - VAL_SHARE))
        cut = text.find('\n', cut) + 1 or text.rfind('\n', 0, cut) + 1 or cut
        if cut == len(text):                                    # the only line end after 95% is the last one
            cut = text.rfind('\n', 0, cut - 1) + 1 or int(len(text) * (1 - VAL_SHARE))
        return [text[:cut]], [text[cut:]], 'one document, its last 5% are val', dropped
    ordered = [unique[digest] for digest in sorted(unique)]
    room, train, val = VAL_SHARE * sum(len(text.encode()) for text in ordered), [], []
    for text in ordered:
        size = len(text.encode())
        (val if size <= room else train).append(text)
        room -= size if size <= room else 0
    if not val and train:
        val = [train.pop(min(range(len(train)), key=lambda i: len(train[i])))]
    return train, val, 'by document in the order of SHA-256, up to 5% of the bytes are val', dropped


# ---------------------------------------------------------------------------------------------------------------------
# Token files

def write_tokens(path, documents, tokenizer, dtype, log):
    """Documents, each ended by eot -> a file of bare ids, safely on disk; returns its entry in meta.json."""
    count, shown, line_start = 0, time.perf_counter(), re.compile(r'\n(?=\S)')
    with open(path, 'wb') as file:
        for number, text in enumerate(documents, 1):
            start = 0
            while start < len(text):                            # a megabyte at a time
                cut = line_start.search(text, start + 2**20)
                end = cut.end() if cut else len(text)
                ids = tokenizer.encode(text[start:end])
                if end == len(text) and tokenizer.eot is not None:
                    ids.append(tokenizer.eot)
                file.write(np.array(ids, dtype=dtype).tobytes())
                count, start = count + len(ids), end
                if time.perf_counter() > shown + 2:
                    shown = time.perf_counter()
                    log(f'  {path.name}: {count:,} tokens, document {number:,} of {len(documents):,}')
        file.flush()
        os.fsync(file.fileno())
    text_bytes = sum(len(text.encode()) for text in documents)
    log(f'  {path.name}: {count:,} tokens of {text_bytes:,} bytes in {len(documents):,} documents')
    return {'path': path.name, 'tokens': count, 'documents': len(documents), 'text_bytes': text_bytes,
            **scan(path, dtype)}


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
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


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
    except FileNotFoundError:
        raise DataError(f'{path}: missing, so this is no prepared corpus (data.py makes one)') from None
    except OSError as error:
        raise damaged(path, f'cannot be read ({error.strerror})') from None
    except (ValueError, RecursionError):
        raise damaged(path, 'is not JSON') from None
    if not isinstance(meta, dict) or type(meta.get('format')) is not int:
        raise damaged(path, 'is not what data.py writes')
    if meta['format'] > FORMAT:
        raise DataError(f'{path}: format {meta["format"]}, this data.py reads up to {FORMAT}; take a newer data.py, or '
                        f'rm -r {shlex.quote(str(path.parent))} to build it anew')
    if meta['format'] == FORMAT and meta.get('checksum') != checksum(meta):
        raise damaged(path, 'does not agree with its own checksum')
    return meta


def up_to_date(folder, want):
    """If a folder holds what is wanted. False: build it. DataError: what is there is damaged or not ours."""
    for attempt in range(2):
        try:
            if not folder.exists() or not any(folder.iterdir()):
                return False
            meta = read_meta(folder)
            return meta['format'] == FORMAT and all(meta[key] == value for key, value in want.items())
        except (DataError, OSError):
            if attempt:
                raise
            time.sleep(0.2)                                     # another process may be replacing it just now


def build(kind, source, files, tokenizer, vocab_size, folder, log):
    """Writes train.bin, val.bin and vocab.json into an empty folder -> what meta.json says about them."""
    if kind == 'tokens':
        return adopt(source, tokenizer, folder, log)
    log(f'  reading {len(files):,} files')
    documents, skipped = read_documents(kind, files)
    train, val, rule, dropped = split(documents)
    if not train or not any(train) or not any(val):
        raise DataError(f'{source}: too little text to be split into training and validation; it takes two documents, '
                        'or one of several lines')
    if skipped or dropped:
        log(f'  left out: {skipped:,} files not in UTF-8, {dropped:,} documents blank or copies')
    vocabulary = make_tokenizer(tokenizer, vocab_size, train, log)
    dtype = 'uint16' if vocabulary.vocab_size <= 2**16 else 'uint32'
    return {'vocab_size': vocabulary.vocab_size, 'eot': vocabulary.eot, 'dtype': dtype, 'split': rule,
            'files_skipped': skipped, 'documents_dropped': dropped,
            'train': write_tokens(folder / 'train.bin', train, vocabulary, dtype, log),
            'val': write_tokens(folder / 'val.bin', val, vocabulary, dtype, log),
            'vocabulary': write_vocabulary(folder / 'vocab.json', vocabulary)}


def write_vocabulary(path, tokenizer):
    """vocab.json -> the entry of the file in meta.json."""
    write_json(path, tokenizer.state())
    return {'path': path.name, 'sha256': hashlib.sha256(path.read_bytes()).hexdigest()}


def adopt(source, tokenizer, folder, log):
    """nanoGPT's train.bin and val.bin (uint16), used where they lie; their meta.pkl, a pickle, stays closed.

    The vocabulary is the one named by --tokenizer, if it is bytes or can be had from tiktoken. Else it is not
    known and its size is the largest id + 1: training works, text and bits per byte are not to be had.
    """
    entries = {}
    for part in ('train', 'val'):
        path = source / f'{part}.bin'
        try:
            entries[part] = {'path': str(path), 'documents': None, 'text_bytes': None, **scan(path, 'uint16')}
        except OSError as error:
            raise DataError(f'{path}: cannot be read ({error.strerror})') from None
        size = entries[part]['size']
        entries[part]['tokens'] = size // 2
        if size == 0 or size % 2:
            raise DataError(f'{path}: {size:,} bytes are no array of uint16 ids as nanoGPT writes it')
    largest = max(entry['largest_id'] for entry in entries.values())
    vocabulary, vocab_size, eot = None, 50257 if tokenizer == 'gpt2' else largest + 1, None
    if tokenizer == 'bpe':
        log(f'  whose vocabulary {source} uses is unknown; say --tokenizer=gpt2 if it is that one')
    else:
        try:
            vocabulary = make_tokenizer(tokenizer, 0, [], log)
            vocab_size, eot = vocabulary.vocab_size, vocabulary.eot
        except DataError as error:
            log(f'  no text and no bits per byte: {error}')
    if largest >= vocab_size:
        raise DataError(f'{source}: id {largest} is beyond the {vocab_size:,} ids of --tokenizer={tokenizer}')
    entry = write_vocabulary(folder / 'vocab.json', vocabulary) if vocabulary else None
    return {'vocab_size': vocab_size, 'eot': eot, 'dtype': 'uint16', 'split': 'as given', 'files_skipped': 0,
            'documents_dropped': 0, **entries, 'vocabulary': entry}


def prepare(dataset, tokenizer, vocab_size, root=None, log=print):
    """Makes sure that the token files are there and up to date -> their folder, a pathlib.Path.

    dataset: stdlib or a path. tokenizer: bpe, bytes or a name of tiktoken's; vocab_size, eot included: bpe's.
    root: where prepared folders lie, default data/ beside this file. log: gets lines of progress.
    Builds in a folder aside, flushed and renamed into place: a crash leaves nothing half made, and of two
    processes that build at once one finds the other's result and throws its own away. Raises DataError.
    """
    check_tokenizer(tokenizer, vocab_size)
    kind, source, name = locate(dataset)
    if kind == 'tokens' and (source / 'vocab.json').is_file() and (source / 'meta.json').is_file():
        read_meta(source)
        return source                                           # a folder that prepare() made
    files = list_files(kind, source)
    label = tokenizer + str(vocab_size) * (tokenizer == 'bpe' and kind != 'tokens')
    folder = pathlib.Path(root or pathlib.Path(__file__).resolve().parent / 'data') / f'{name[-80:]}-{label}'
    want = {'dataset': name, 'tokenizer': tokenizer, 'pattern': PATTERN,
            'fingerprint': fingerprint(source, files)}
    temporary = folder.with_name(f'.{folder.name}.{os.getpid()}-{secrets.token_hex(4)}')
    try:
        if up_to_date(folder, want):
            return folder
        log(f'preparing {folder}')
        for left in folder.parent.glob('.*'):                   # by processes killed a day ago or earlier
            if left.name.startswith(f'.{folder.name}.') and left.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        meta = {'format': FORMAT, **want, **build(kind, source, files, tokenizer, vocab_size, temporary, log)}
        write_json(temporary / 'meta.json', {**meta, 'checksum': checksum(meta)})
        for attempt in range(20):
            if up_to_date(folder, want):                        # another process was first
                return folder
            try:
                os.rename(temporary, folder)
                break
            except OSError:
                if attempt == 19 or not folder.exists():
                    raise
            old = temporary.with_name(temporary.name + '-old')  # a stale one is in the way
            os.rename(folder, old)
            shutil.rmtree(old, ignore_errors=True)
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

    max_train_tokens, max_val_tokens: use only the first so many, 0 = all. block_size: tokens of context.
    Raises DataError: size, SHA-256 or ids disagree with meta.json, or a split is shorter than block_size + 1.
    """

    def __init__(self, folder, max_train_tokens=0, max_val_tokens=0, block_size=512):
        self.folder, self.block_size = pathlib.Path(folder), block_size
        self.meta = read_meta(self.folder)
        self.vocab_size, self.eot = self.meta['vocab_size'], self.meta['eot']
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
        tokens = tokens[:cap] if cap else tokens
        if len(tokens) <= self.block_size:
            raise DataError(f'{self.folder}: {len(tokens):,} {part} tokens cannot fill one context of '
                            f'--block_size={self.block_size} plus one; take a smaller one or more text')
        return tokens

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
        of the training tokens used, one added to each. val_bytes: of the targets' text, null if not known.
        """
        counts, targets = self._count(self.train) + 1.0, self._count(self.val[1:])
        return {'dataset': self.meta['dataset'], 'tokenizer': self.meta['tokenizer'],
                'vocab_size': self.vocab_size,
                'train_tokens': len(self.train), 'val_tokens': len(self.val),
                'val_bytes': int(targets @ self.tokenizer.token_bytes) if self.tokenizer else None,
                'train_sha256': self.meta['train']['sha256'], 'val_sha256': self.meta['val']['sha256'],
                'max_train_tokens': self.caps['train'], 'max_val_tokens': self.caps['val'],
                'uniform_loss': math.log(self.vocab_size),
                'unigram_loss': float(-(targets @ np.log(counts / counts.sum())) / targets.sum())}


if __name__ == '__main__':
    from configurator import configure, fail
    # -----------------------------------------------------------------------------------------------------------------
    # What to prepare
    dataset = 'stdlib'      # stdlib (this Python's standard library, about 12 MB), a text file, a folder of text files
                            # (.txt .md .py ...; split by file), or a folder with nanoGPT's train.bin and val.bin
    tokenizer = 'bpe'       # bpe (trained on the training split), bytes, gpt2 or another tiktoken name (a download)
    vocab_size = 4096       # tokens in the vocabulary that bpe trains, the end of text included
    data_root = ''          # where token files are kept; empty: the folder data/ beside data.py
    # -----------------------------------------------------------------------------------------------------------------
    configure(globals())
    try:
        folder = prepare(dataset, tokenizer, vocab_size, data_root)
        corpus = Corpus(folder, block_size=1)
    except DataError as error:
        fail(error)
    except KeyboardInterrupt:
        fail('interrupted, nothing half made is left')
    facts = corpus.describe()
    print(f'{folder} is ready and verified')
    for part in ('train', 'val'):
        text_bytes = corpus.meta[part]['text_bytes']
        ratio = f', {text_bytes / facts[f"{part}_tokens"]:.2f} bytes each' if text_bytes else ''
        print(f'  {part:5} {facts[f"{part}_tokens"]:,} tokens{ratio}')
    print(f'  loss of a uniform guess {facts["uniform_loss"]:.4f}, '
          f'of unigram frequencies {facts["unigram_loss"]:.4f}')
