"""Files -> documents: text, rows of JSON or Parquet, gzip, in little memory. data.py makes tokens of them.

A document is a text file, the stretch between two lines of just <|endoftext|> in one, or one row's text. What cannot be
read is named, file and line; what is left out is counted.
"""

import codecs
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import zlib
from array import array
from collections import Counter

from tokenizer import EOT, DataError, paced

TEXT_ENDINGS = ('.txt', '.md', '.rst', '.tex', '.html', '.py', '.c', '.h', '.cpp', '.js', '.ts', '.java', '.go', '.rs')
ROW_ENDINGS = ('.jsonl', '.ndjson', '.parquet')
MARKS = {codecs.BOM_UTF8: 'utf-8-sig',                          # UTF-32's first: its mark begins with that of UTF-16
         codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',
         codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}
SEPARATOR = re.compile(rf'(?m)^{re.escape(EOT)}[ \t\r]*(?:\n|\Z)')


def ending(path):
    """The ending that says how a file is read, in small letters; .gz is looked through."""
    return pathlib.Path(path.name.lower().removesuffix('.gz')).suffix


def list_files(folder, endings=TEXT_ENDINGS + ROW_ENDINGS, skip=(), hidden=('.',), followlinks=True):
    """-> (files, sorted; a sentence each on what is odd; a sentence each on folders that cannot be read).

    skip: names of folders, hidden: beginnings of names that are passed over. A linked folder is visited, each once.
    """
    files, others, closed, seen = [], Counter(), [], set()
    for parent, folders, names in os.walk(folder, onerror=closed.append, followlinks=followlinks):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith(hidden))
        for path in (pathlib.Path(parent, name) for name in names if not name.startswith(hidden)):
            if ending(path) in endings:
                files.append(path)
            else:
                others[path.suffix or 'none'] += 1
    closed = [f'{error.filename}: cannot be read ({error.strerror})' for error in closed]
    if not files:
        raise DataError(closed[0] if closed else
                        f'{folder}: no text files in it; endings read are {" ".join(endings)}, and .gz behind them')
    read, odd = Counter(map(ending, files)), []
    if others:
        odd.append(f'{others.total():,} files were left out for their endings: {counted(others)}.')
    if len(read.keys() & set(ROW_ENDINGS)) not in (0, len(read)):
        odd.append(f'Rows and whole files are mixed: {counted(read)}.')
    return sorted(files), odd, closed


def counted(counter):
    return ', '.join(f'{n:,} {name}' for name, n in counter.most_common(5))


class Documents:
    """The documents of a corpus, one behind the other in a file; in memory are 48 bytes of each. Counts what is odd.

    starts, ends: of each in the file. digests: SHA-256 of each, end to end. odd: a Counter. problems: what could not
    be used, a sentence per file.
    """

    def __init__(self, file, log):
        self.file, self.progress = file, paced(log)
        self.starts, self.ends, self.digests = array('q'), array('q'), bytearray()
        self.odd, self.problems = Counter(), []
        self._begin(0)

    def _begin(self, size):
        self.start = self.size = size
        self.digest, self.blank = hashlib.sha256(), True

    def write(self, text, end=False):
        """Goes on with the document. UnicodeEncodeError if the text holds half a surrogate pair."""
        content = text.encode()
        try:
            self.file.write(content)
        except OSError as error:                                # not to be taken for a fault of the file that is read
            raise DataError(f'the temporary copy of the text cannot be written ({error.strerror}); make room or give '
                            'another place with --data_root=FOLDER') from None
        self.digest.update(content)
        self.size += len(content)
        self.blank = self.blank and not text.strip()
        self.odd['inline'] += text.count(EOT)
        if end and not self.blank:
            self.starts.append(self.start)
            self.ends.append(self.size)
            self.digests += self.digest.digest()
        if end:
            self.odd['blank'] += self.blank and self.size > self.start
            self._begin(self.size)

    def read(self, files, text_field):
        """Appends the documents of all these files; of a broken one nothing, of one with broken rows the others."""
        for number, path in enumerate(files, 1):
            size, count, odd = self.size, len(self.starts), self.odd.copy()
            try:
                for text, end in (rows if ending(path) in ROW_ENDINGS else texts)(path, text_field, self):
                    self.write(text, end)
                    self.progress(f'  reading: file {number:,} of {len(files):,}, {self.size:,} bytes of text')
            except DataError:
                raise
            except (OSError, EOFError, zlib.error, ValueError) as error:
                reason = f'cannot be read ({error.strerror or error})' if isinstance(error, OSError) else error
                self.problems.append(f'{path}: {reason}')
                self.file.seek(size)
                self.file.truncate()
                del self.starts[count:], self.ends[count:], self.digests[32 * count:]
                self.odd = odd
                self._begin(size)

    def remarks(self):
        """What is odd, a sentence each."""
        said, n, bad = [], self.odd, self.problems
        if bad:
            said.append(f'{len(bad):,} files or folders could not be used, whole or in part, as {bad[0]}.')
        if n['lacking']:
            said.append(f'{n["lacking"]:,} rows without a text in the text field were left out.')
        if n['inline']:
            said.append(f'{EOT} stands {n["inline"]:,} times beside other text and was read as text: only lines of it '
                        'alone end documents.')
        if n['like json']:
            said.append(f'{n["like json"]:,} files look like JSON lines and were read as plain text: name them .jsonl.')
        return said


def opened(path):
    """-> (binary file, its encoding: what a byte-order mark names, or UTF-8)."""
    file = gzip.open(path) if path.name.lower().endswith('.gz') else open(path, 'rb')
    start = file.read(4)
    file.seek(0)
    return file, next((name for mark, name in MARKS.items() if start.startswith(mark)), 'utf-8')


def texts(path, text_field, documents):
    """A text file -> (stretch of text, whether it ends a document), 2 MB at a time. ValueError: it is no text."""
    file, encoding = opened(path)
    decoder, rest, position, block = codecs.getincrementaldecoder(encoding)(), '', 0, True
    with file:
        while block:
            block = file.read(2**21)
            try:
                text = rest + decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ValueError(f'not {encoding.upper()} text (near byte {position + error.start:,}); convert it '
                                 '(iconv -f ITS_ENCODING -t utf-8)') from None
            if position == 0 and text.count('\0') > len(text) / 4:
                raise ValueError('full of zero bytes: UTF-16 without its mark (iconv -f utf-16le -t utf-8), or no text')
            if position == 0 and text.startswith('{') and isinstance(parse(text.partition('\n')[0]), dict):
                documents.odd['like json'] += 1
            whole = text.rfind('\n') + 1 if block else len(text)        # whole lines, lest a separator be cut in two
            *ended, last = SEPARATOR.split(text[:whole])
            yield from ((document, True) for document in ended)
            yield last, not block
            rest, position = text[whole:], position + len(block)


def rows(path, text_field, documents):
    """A file of rows -> (text, True) each. Those without the field are counted, broken ones told of as a problem."""
    lacking, broken, first, fields, number = 0, 0, None, {}, 0
    reader = parquet_rows if ending(path) == '.parquet' else json_rows
    for number, (where, row) in enumerate(reader(path, text_field), 1):
        try:
            if not isinstance(row, dict):
                raise ValueError('not JSON' if isinstance(row, Exception) else f'{type(row).__name__}, not an object')
            text = row.get(text_field)
            if text is None:
                lacking, fields = lacking + 1, fields | row
                continue
            if not isinstance(text, str):
                raise ValueError(f'{text_field} is {type(text).__name__}, not text')
            if re.search('[\ud800-\udfff]', text):
                raise ValueError(f'{text_field} holds bytes that are no text')
            yield text, True
        except ValueError as error:
            broken, first = broken + 1, first or f'{where}: {error}'
    if lacking and lacking + broken == number:
        raise ValueError(f'no row has a text in the field {text_field}; there are {", ".join(fields)}: choose by '
                         '--text_field=NAME')
    documents.odd['lacking'] += lacking
    if broken:
        documents.problems.append(f'{path}: {broken:,} of {number:,} rows are broken, the first at {first}')


def parse(line):
    """A line of JSON -> its value, or the error that says why it has none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return error


def json_rows(path, text_field):
    file, encoding = opened(path)
    errors = 'surrogateescape' if encoding.startswith('utf-8') else 'strict'   # a bad byte breaks its row alone
    with io.TextIOWrapper(file, encoding, errors, '\n') as lines:
        yield from ((f'line {number:,}', parse(line)) for number, line in enumerate(lines, 1) if line.strip())


def parquet_rows(path, text_field):
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f'{path}: .parquet takes pyarrow (pip install pyarrow); or convert it to .jsonl') from None
    try:
        with ParquetFile(path) as file:
            number, names = 0, file.schema_arrow.names
            for batch in file.iter_batches(256, columns=[text_field] if text_field in names else names):
                for number, row in enumerate(batch.to_pylist(), number + 1):
                    yield f'row {number:,}', row
    except pyarrow.ArrowException as error:
        raise ValueError(f'cannot be read as Parquet ({str(error).splitlines()[0]})') from None
