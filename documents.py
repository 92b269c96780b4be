"""Files -> documents: text, rows of JSON or Parquet, gzip, in little memory. data.py makes tokens of them.

A document is a text file, the stretch between two lines of just <|endoftext|> in one, or one row's text. What cannot be
read is named, file and line; copies and files of other endings are counted.
"""

import codecs
import gzip
import hashlib
import io
import json
import os
import re
import time
import zlib
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from tokenizer import EOT, DataError

TEXT_ENDINGS = ('.txt', '.md', '.rst', '.tex', '.html', '.py', '.c', '.h', '.cpp', '.js', '.ts', '.java', '.go', '.rs')
ROW_ENDINGS = ('.jsonl', '.ndjson', '.parquet')
SEPARATOR = re.compile(rf'(?m)^{re.escape(EOT)}[ \t\r]*(?:\n|\Z)')
BLOCK = 2**21                                                   # characters of a text file in memory at a time, or a line
ODD = {'inline': EOT + ' stands {:,} times where it is text: only in a text file, as a line of its own, does it end documents.',
       'like json': '{:,} files look like JSON lines and were read as plain text: name them .jsonl.'}


def paced(log, seconds=2):
    """`log` for lines of progress: says one at most every so many seconds and drops the others."""
    last = time.perf_counter()

    def say(line):
        nonlocal last
        if time.perf_counter() > last + seconds:
            last = time.perf_counter()
            log(line)
    return say


def ending(path):
    """The ending that says how a file is read, in small letters; .gz is looked through."""
    return Path(path.name.lower().removesuffix('.gz')).suffix


def list_files(folder, endings=TEXT_ENDINGS + ROW_ENDINGS, skip=r'\.'):
    """-> (files, sorted; remarks, a sentence each). A folder that cannot be looked into counts as a file that cannot be read.

    skip: names of files and folders that begin like this are passed over. Linked folders are visited, each once.
    """
    found, closed, seen, remarks = [], [], set(), []
    for parent, folders, names in os.walk(folder, onerror=closed.append, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not re.match(skip, name))
        found += [Path(parent, name) for name in names if not re.match(skip, name)]
    files = [path for path in found if ending(path) in endings]
    if not files and not closed:
        raise DataError(f'{folder}: no text files in it; endings read are {" ".join(endings)}, and .gz behind them')

    def counted(kinds):
        return ', '.join(f'{n:,} {kind or "without"}' for kind, n in Counter(kinds).most_common(5)) + '.'
    if len(found) > len(files):
        others = [path.suffix for path in found if ending(path) not in endings]
        remarks.append(f'{len(others):,} files were left out for their endings: {counted(others)}')
    if len({ending(path) in ROW_ENDINGS for path in files}) == 2:
        remarks.append(f'Rows and whole files are mixed: {counted(map(ending, files))}')
    return sorted(files + [Path(error.filename) for error in closed]), remarks


def read_documents(files, text_field, skip_bad_files, spool, log):
    """Appends the documents of all files to the binary file `spool`; in memory are 48 bytes of each.

    -> spans (n, 2), start and end of each document, in the order of the documents' SHA-256; remarks. That order is arbitrary,
    so that the first N tokens are a fair sample, yet the same everywhere. Copies are left out: one could end up on either
    side of a split. DataError if there are problems, unless skip_bad_files leaves out all of a broken file.
    """
    log(f'  reading {len(files):,} files')
    spans, digests, odd, problems, size, progress = array('q'), bytearray(), Counter(), [], 0, paced(log)
    for number, path in enumerate(files, 1):
        start, digest, blank = size, hashlib.sha256(), True
        before = len(spans), len(digests), odd.copy()
        try:
            for text, end in read_file(path, text_field, odd, problems):
                content = text.encode()
                spool.write(content)
                digest.update(content)
                size += len(content)
                blank = blank and not text.strip()
                odd['inline'] += text.count(EOT)
                if end:
                    if not blank:
                        spans.extend((start, size))
                        digests += digest.digest()
                    start, digest, blank = size, hashlib.sha256(), True
                progress(f'  reading: file {number:,} of {len(files):,}, {size:,} bytes of text')
        except DataError:                                       # of no single file
            raise
        except ValueError as error:
            problems.append(f'{path}: {error}')
            del spans[before[0]:], digests[before[1]:]
            odd = before[2]
    remarks = [sentence.format(odd[what]) for what, sentence in ODD.items() if odd[what]]
    if problems:
        more = f', and {len(problems) - 1:,} more' * (len(problems) > 1)
        remarks.insert(0, f'Could not be used, whole or in part: {problems[0]}{more}')
        if not skip_bad_files:
            for problem in problems:
                log(f'  {problem}')
            raise DataError(f'{remarks[0]}; data.py --skip_bad_files=True leaves it out, with the same --dataset, '
                            '--tokenizer and --vocab_size')
    kept = np.unique(np.frombuffer(digests, 'S32'), return_index=True)[1]
    if copies := len(digests) // 32 - len(kept):
        log(f'  left out: {copies:,} copies of other documents')
    return np.array(spans).reshape(-1, 2)[kept], remarks


def read_file(path, text_field, odd, problems):
    """A file -> (stretch of text, whether it ends a document). ValueError says why it cannot be read to its end."""
    try:
        yield from rows(path, text_field, problems) if ending(path) in ROW_ENDINGS else texts(path, odd)
    except UnicodeDecodeError as error:
        raise ValueError(f'not {error.encoding.upper()} text; convert it (iconv -f ITS_ENCODING -t utf-8), or unpack it: '
                         'of packed files only .gz is read') from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f'cannot be read ({getattr(error, "strerror", None) or error})') from None


def opened(path, errors='strict'):
    """A file for reading text, in the encoding that its byte-order mark names, or UTF-8."""
    file = gzip.open(path) if path.name.lower().endswith('.gz') else open(path, 'rb')
    encoding = 'utf-16' if file.peek(2).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else 'utf-8-sig'
    return io.TextIOWrapper(file, encoding, errors, newline='\n')


def texts(path, odd):
    with opened(path) as file:
        block = ''.join(file.readlines(BLOCK))                  # whole lines, lest a separator be cut in two
        if block.count('\0') > len(block) / 4:
            raise ValueError('full of zero bytes: UTF-16 without its mark (iconv -f utf-16le -t utf-8), or no text')
        odd['like json'] += parse(block.partition('\n')[0]) is not None
        while block:
            *ended, last = SEPARATOR.split(block)
            yield from ((document, True) for document in ended)
            yield last, False
            block = ''.join(file.readlines(BLOCK))
    yield '', True


def rows(path, text_field, problems):
    """Broken rows are left out and told of as one problem."""
    number, broken, first = 0, 0, None
    found = parquet_rows(path, text_field) if ending(path) == '.parquet' else json_rows(path)
    for number, (where, row) in enumerate(found, 1):
        try:
            if row is None:
                raise ValueError('not a JSON object')
            text = row.get(text_field)
            if not isinstance(text, str):
                raise ValueError(f'no text in the field {text_field}; there are {", ".join(row)}: choose by '
                                 '--text_field=NAME')
            text.encode()                                       # half a surrogate pair, bytes that are no text
            yield text, True
        except ValueError as error:
            broken, first = broken + 1, first or f'{where}: {error}'
    if broken:
        problems.append(f'{path}: {broken:,} of {number:,} rows are broken, the first at {first}')


def parse(line):
    """The object in a line of JSON, or None."""
    try:
        row = json.loads(line)
        return row if isinstance(row, dict) else None
    except (ValueError, RecursionError):
        return None


def json_rows(path):
    with opened(path, 'surrogateescape') as lines:              # a bad byte breaks its row alone
        yield from ((f'line {number:,}', parse(line)) for number, line in enumerate(lines, 1) if line.strip())


def parquet_rows(path, text_field):
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f'{path}: .parquet takes pyarrow (pip install pyarrow); or convert it to .jsonl') from None
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            batches = file.iter_batches(256, columns=[text_field] if text_field in names else names)
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield f'row {number:,}', row
    except pyarrow.ArrowException as error:
        raise ValueError(f'cannot be read as Parquet ({str(error).splitlines()[0]})') from None
