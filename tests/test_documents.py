"""documents.py: the files that people have, each against Python's own readers; what is not read is named or counted."""

import gzip
import io
import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY, message_of, silent, text

import documents
from data import Corpus, DataError, prepare
from documents import EOT
from test_data import documents_of

TEXTS = [text(i) for i in range(30)]


def read(path, tmp_path, tokenizer='bytes', **options):
    """Prepare a corpus -> (its texts, sorted; its Corpus)."""
    folder = prepare(str(path), tokenizer, 0, tmp_path / 'root', silent, **options)
    return sorted(documents_of(folder, 'train') + documents_of(folder, 'val')), Corpus(folder, block_size=1)


def refused(path, tmp_path, **options):
    lines = []
    with pytest.raises(DataError) as error:
        prepare(str(path), 'bytes', 0, tmp_path / 'root', lines.append, **options)
    assert list((tmp_path / 'root').iterdir()) == []
    return message_of(error), '\n'.join(lines)


def as_rows(texts, field='text'):
    return ''.join(json.dumps({'id': i, field: text, 'meta': {'a': [1]}}, ensure_ascii=i % 2 == 0) + '\n'
                   for i, text in enumerate(texts)).encode()


def parquet(path, rows):
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)


# ---- rows --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['a.jsonl', 'a.JSONL', 'a.ndjson', 'a.jsonl.gz', 'b/a.jsonl', 'b/c/a.JSONL.GZ'])
@pytest.mark.parametrize('field', ['text', 'content'])
def test_each_row_of_json_is_a_document(tmp_path, name, field):
    path = tmp_path / 'in' / name
    path.parent.mkdir(parents=True)
    content = as_rows(TEXTS, field)
    path.write_bytes(gzip.compress(content) if name.lower().endswith('.gz') else content)
    found, corpus = read(tmp_path / 'in' if '/' in name else path, tmp_path, text_field=field)
    assert found == sorted(TEXTS) and corpus.remarks == []


@pytest.mark.parametrize('field', ['text', 'body'])
def test_each_row_of_parquet_is_a_document(tmp_path, field):
    (tmp_path / 'in').mkdir()
    for part in range(3):
        parquet(tmp_path / 'in' / f'{part}.parquet', [{'id': i, field: t} for i, t in enumerate(TEXTS[part::3])])
    found, corpus = read(tmp_path / 'in', tmp_path, text_field=field)
    assert found == sorted(TEXTS) and corpus.remarks == []
    assert 'there are id, ' + field in refused(tmp_path / 'in', tmp_path / 'other', text_field='txt')[0]


def test_the_text_field_is_part_of_what_a_folder_is_prepared_for(tmp_path):
    rows = ''.join(json.dumps({'question': q, 'answer': a}) + '\n' for q, a in zip(TEXTS[:15], TEXTS[15:]))
    (tmp_path / 'qa.jsonl').write_text(rows)
    assert read(tmp_path / 'qa.jsonl', tmp_path, text_field='question')[0] == sorted(TEXTS[:15])
    assert read(tmp_path / 'qa.jsonl', tmp_path, text_field='answer')[0] == sorted(TEXTS[15:])
    message, _ = refused(tmp_path / 'qa.jsonl', tmp_path / 'other')
    assert 'question, answer' in message and '--text_field' in message


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / 'a.parquet').write_bytes(b'PAR1')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    assert 'pip install pyarrow' in refused(tmp_path / 'a.parquet', tmp_path, skip_bad_files=True)[0]


@pytest.mark.parametrize('row', [b'{"text": "cut', b'["text"]', b'"text"', b'7', b'null', b'{"text": 7}',
                                 b'{"text": ["a"]}', b'{"text": "\\ud83d"}', b'{"text": "\xe9"}', b'[' * 99999,
                                 b'{"text": "a"} {"text": "b"}', b'{"title": "none"}',
                                 b'{"text": null}'])
@pytest.mark.parametrize('lone', [True, False])
def test_a_broken_row_is_named_by_its_line_and_left_out_when_told_so(tmp_path, row, lone):
    (tmp_path / 'in').mkdir()
    path = tmp_path / 'in' / 'a.jsonl'
    path.write_bytes(as_rows(TEXTS[:10]) + row + b'\n' + as_rows(TEXTS[10:]) + row)
    (tmp_path / 'in' / 'b.jsonl').write_bytes(as_rows(['another']))
    dataset = path if lone else path.parent
    message, _ = refused(dataset, tmp_path)
    assert 'a.jsonl: 2 of 32 rows are broken, the first at line 11' in message and '--skip_bad_files=True' in message
    found, corpus = read(dataset, tmp_path, skip_bad_files=True)
    assert found == sorted(TEXTS + ['another'] * (not lone)) and 'a.jsonl: 2 of 32 rows' in corpus.remarks[0]
    assert read(dataset, tmp_path)[1].remarks == corpus.remarks         # found again without the flag, and said again


def test_a_row_of_parquet_that_is_no_text_is_named(tmp_path):
    parquet(tmp_path / 'a.parquet', [{'text': t.encode()} for t in TEXTS])
    assert '30 of 30 rows are broken, the first at row 1: no text' in refused(tmp_path / 'a.parquet', tmp_path)[0]
    parquet(tmp_path / 'b.parquet', [*({'text': t} for t in TEXTS), {'text': None}, {'text': ''}])
    assert '1 of 32 rows are broken, the first at row 31' in refused(tmp_path / 'b.parquet', tmp_path)[0]
    assert read(tmp_path / 'b.parquet', tmp_path, skip_bad_files=True)[0] == sorted(TEXTS)


# ---- text --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('name', ['a.txt', 'a.TXT', 'a.Md', 'a.txt.gz', 'a.strange'])
def test_text_is_what_its_mark_says_in_whatever_file(tmp_path, encoding, name):
    content = 'caf\u00e9\r\n\u4e2d\U0001f600\n'.join(TEXTS)
    raw = content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith('gz') else raw)
    folder = prepare(str(tmp_path / name), 'bytes', 0, tmp_path / 'root', silent)
    (train,), (val,) = documents_of(folder, 'train'), documents_of(folder, 'val')
    assert train + val == content and Corpus(folder, block_size=1).remarks == []


@pytest.mark.parametrize('order', ['utf-16-le', 'utf-16-be'])
def test_marks_of_either_byte_order_and_rows_in_them(tmp_path, order):
    (tmp_path / 'a.jsonl').write_bytes(('\ufeff' + as_rows(TEXTS).decode()).encode(order))
    assert read(tmp_path / 'a.jsonl', tmp_path)[0] == sorted(TEXTS)


@pytest.mark.parametrize('size', [1, 2, 7, 40, 1000])
def test_blocks_of_any_size_give_the_same_documents(tmp_path, monkeypatch, size):
    """As re.split() of the whole text does, where a separator, a character or a line end may lie across blocks."""
    parts = [f'<|endoftext| {i} \u4e2d\U0001f600\r\n' * (i % 4) for i in range(1, 12)]
    content = f'\r\n{EOT} \t\r\n'.join(parts) + f'\n{EOT}'
    monkeypatch.setattr(documents, 'BLOCK', size)
    (tmp_path / 'x.txt').write_bytes(content.encode('utf-16'))
    spool = io.BytesIO()
    spans, _ = documents.read_documents([tmp_path / 'x.txt'], 'text', False, spool, silent)
    found = [spool.getvalue()[start:end].decode() for start, end in spans]
    assert sorted(found) == sorted(part for part in documents.SEPARATOR.split(content) if part.strip())
    assert len(found) == sum(bool(part) for part in parts)


def test_an_end_of_text_within_a_line_is_text_and_said(tmp_path):
    (tmp_path / 'in').mkdir()
    for i in range(9):
        (tmp_path / 'in' / f'{i}.txt').write_text(f'{TEXTS[i]} {EOT} more\n{EOT}\nsecond of {i}\n')
    found, corpus = read(tmp_path / 'in', tmp_path)
    assert len(found) == 18 and sum(EOT in t for t in found) == 9 and f'{EOT} stands 9 times' in corpus.remarks[0]


def test_json_lines_under_another_name_are_said(tmp_path):
    (tmp_path / 'a.txt').write_bytes(as_rows(TEXTS))
    (tmp_path / 'b.txt').write_text('{curly} but no JSON\n' * 99)
    assert 'look like JSON lines' in read(tmp_path / 'a.txt', tmp_path)[1].remarks[0]
    assert read(tmp_path / 'b.txt', tmp_path)[1].remarks == []


# ---- folders -----------------------------------------------------------------------------------------------

def test_capitals_linked_folders_and_other_endings(tmp_path):
    inside, outside = tmp_path / 'in', tmp_path / 'elsewhere'
    inside.mkdir()
    outside.mkdir()
    (inside / 'A.TXT').write_text(TEXTS[0])
    (outside / 'b.Py').write_text(TEXTS[1])
    (inside / 'link').symlink_to(outside, target_is_directory=True)
    (inside / 'round').symlink_to(inside, target_is_directory=True)         # must come to an end
    (inside / 'c.zst').write_bytes(b'x')
    (inside / 'LICENSE').write_bytes(b'x')
    (inside / 'd.jsonl').write_bytes(as_rows(TEXTS[2:5]))
    found, corpus = read(inside, tmp_path)
    assert found == sorted(TEXTS[:5])
    left_out, mixed = corpus.remarks
    assert left_out.startswith('2 files were left out') and '1 .zst' in left_out and '1 without' in left_out
    assert 'mixed' in mixed and '1 .jsonl' in mixed


def test_bad_files_are_all_named_and_left_out_when_told_so(tmp_path):
    folder = tmp_path / 'in'
    folder.mkdir()
    for i, content in enumerate(TEXTS):
        (folder / f'{i:02}.txt').write_text(content, encoding='utf-8')
    whole = gzip.compress(as_rows([f'{i} {EOT} of a file that ends too soon' for i in range(3000)]))
    bad = {'latin.txt': b'caf\xe9' * 99, 'late.txt': b'fine\n' * 999 + b'\xff', 'cut.jsonl.gz': whole[:-30],
           'no.txt.gz': b'no gzip', 'flipped.jsonl.gz': whole[:200] + b'\0\0\0\0' + whole[204:],
           'other.jsonl': b'{"body": "a"}', 'wide.txt': 'abc'.encode('utf-16-le')}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / 'gone.txt').symlink_to('nowhere')
    message, lines = refused(folder, tmp_path)
    assert all(name in lines for name in [*bad, 'gone.txt'])
    assert '7 more' in message and '--skip_bad_files=True' in message
    found, corpus = read(folder, tmp_path, skip_bad_files=True)
    assert found == sorted(TEXTS) and '7 more' in corpus.remarks[0] and 'mixed' in corpus.remarks[1]


def test_a_broken_parquet_file_is_named(tmp_path):
    pytest.importorskip('pyarrow')
    (tmp_path / 'a.parquet').write_bytes(b'PAR1 not really PAR1')
    assert 'a.parquet' in refused(tmp_path / 'a.parquet', tmp_path)[0]


# ---- size --------------------------------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform != 'linux', reason='limits the address space')
def test_a_corpus_larger_than_memory_is_prepared(tmp_path):
    """60 MB of text, as rows and as one document, by a process that may take 56 MB more than its modules have."""
    line = 'the quick brown fox jumps over the lazy dog and so on and on\n'
    with gzip.open(tmp_path / 'rows.jsonl.gz', 'wb', 1) as file:
        for i in range(600):
            file.write(json.dumps({'text': f'{i}\n' + line * 1600}).encode() + b'\n')
    with open(tmp_path / 'lone.txt', 'w') as file:
        for i in range(600):
            file.write(f'{i}\n' + line * 1600)
    code = ('import sys, resource, data, tiktoken, regex\n'
            'used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) << 10\n'
            'resource.setrlimit(resource.RLIMIT_DATA, (used + (56 << 20),) * 2)\n'
            'folder = data.prepare(sys.argv[1], "bytes", 0, sys.argv[2], lambda line: None)\n'
            'print(data.read_meta(folder)["train"]["tokens"])\n')
    for name in ('rows.jsonl.gz', 'lone.txt'):
        run = subprocess.run([sys.executable, '-c', code, str(tmp_path / name), str(tmp_path / 'root')],
                             cwd=REPOSITORY, text=True, capture_output=True)
        assert run.returncode == 0 and int(run.stdout) > 54e6, run.stderr[-500:]
