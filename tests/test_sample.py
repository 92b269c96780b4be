"""sample.py: the text is the model's, whole characters as they come, every way to end, every bad input in one line."""

import io
import os
import random
import re
import runpy
import signal
import subprocess
import sys
from types import SimpleNamespace

import forked
import pytest
import tiktoken
import torch
from conftest import REPOSITORY

import attention
import hf
import machine
from decoding import generate
from model import LanguageModel, ModelConfig
from result import SCHEMA
from tokenizer import Tokenizer

ON_CPU = ('--device=cpu', '--dtype=float32', '--compile=False')
GREEDY = (*ON_CPU, '--temperature=0')
PROMPT = 'def f(x):'
BLOCK = 64                                                  # block_size of config/smoke.py
DASHES = '-' * 20 + '\n'


def python(*arguments, **kwargs):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUTF8': '1', **kwargs.pop('env', {})}
    pipes = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **kwargs}
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=REPOSITORY, env=env, **pipes)


def ended(process):
    out, err = process.communicate(timeout=100)
    return SimpleNamespace(code=process.returncode, out=(out or b'').decode('utf-8', 'replace'), err=err.decode())


def one_line(run, *words):
    """`run` ended as bad input does: exit status 2, one line on stderr that has these words, no text."""
    assert run.code == 2 and run.err.count('\n') == 1 and 'Traceback' not in run.err and not run.out, run
    assert all(str(word) in run.err for word in words), (words, run.err)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run folder as train.py leaves it: latent attention, a vocabulary of 300, two updates."""
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'texts').mkdir()
    rng, words = random.Random(0), 'def class return import self x y f(x): (1 + 2) # the \u00e9 \u4e2d\u6587'.split(' ')
    for i in range(20):
        text = ''.join(rng.choice(words) + rng.choice('   \n') for _ in range(300))
        (folder / 'texts' / f'{i}.txt').write_text(text, encoding='utf-8')
    run = forked.run('train.py', 'config/smoke.py', '--max_steps=2', '--attn=enhanced', '--tokenizer=bpe',
                     '--vocab_size=300', '--device=cpu', f'--dataset={folder / "texts"}',
                     f'--data_root={folder / "data"}', f'--out_dir={folder / "run"}')
    assert run.returncode == 0, run.stderr
    return folder / 'run'


@pytest.fixture(scope='module')
def lively(trained, tmp_path_factory):
    """A checkpoint file with random weights, whose text wanders (the trained one repeats itself) and does not end."""
    model, tokenizer = load(trained / 'checkpoint.pt')
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.3 if name.startswith('layers') and 'router' not in name else 0.02, generator=generator)
    model.embed.weight.data[tokenizer.eot] = 0              # a logit of 0 where the largest are far above
    return changed(trained, tmp_path_factory.mktemp('lively'), model=model.state_dict())


def changed(run, folder, **entries):
    """A checkpoint file like run's, but for these entries: a value, or a function of the old one."""
    content = torch.load(run if run.is_file() else run / 'checkpoint.pt', weights_only=True)
    for key, value in entries.items():
        content[key] = value(content[key]) if callable(value) else value
    torch.save(content, folder / 'changed.pt')
    return folder / 'changed.pt'


def shown(tokenizer, prompt, row):
    """What is printed for a sample whose tokens are `row`."""
    return prompt + tokenizer.decode(row[:row.index(tokenizer.eot)] if tokenizer.eot in row else row) + '\n'


def load(path):
    """-> model, tokenizer of a checkpoint file, not by sample.py."""
    content = torch.load(path, weights_only=True)
    model = LanguageModel(ModelConfig(**content['model_config']))
    model.load_state_dict(content['model'])
    return model.eval(), Tokenizer.from_state(content['tokenizer'])


def greedy_by_full_forwards(path, prompt, n):
    """Text of prompt + n likeliest tokens, each from a forward over the whole window; a full one shrinks by half."""
    model, tokenizer = load(path)
    text = tokenizer.encode(prompt)
    window, new = text[-BLOCK:], []
    for _ in range(n):
        if len(window) > BLOCK:
            window = window[-(BLOCK // 2):]
        with torch.no_grad():
            best = model(torch.tensor([window]))[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 1e-4       # no tie that rounding could turn
        new.append(best.indices[0].item())
        window = window + new[-1:]
    assert len(set(new)) > n // 5                           # a text that wanders, or it would test nothing
    return prompt + tokenizer.decode(new)


@pytest.fixture
def sample(monkeypatch, capfd):
    """sample(path, '--knob=value', ...): sample.py inside this process -> code, out, err."""
    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['sample.py', *map(str, arguments)])
        before = signal.getsignal(signal.SIGINT)
        capfd.readouterr()
        try:
            runpy.run_path(str(REPOSITORY / 'sample.py'), run_name='__main__')
            code = None                                     # it ends by sys.exit, always
        except SystemExit as error:
            code = error.code
        except Exception:                                   # as the interpreter would
            with pytest.raises(SystemExit) as end:
                sys.excepthook(*sys.exc_info())
            code = end.value.code
        finally:
            signal.signal(signal.SIGINT, before)
            sys.excepthook = sys.__excepthook__
        return SimpleNamespace(code=code, **dict(zip(('out', 'err'), capfd.readouterr())))
    return run


# ---------------------------------------------------------------------------------------------------------------------
# The text is the model's

def test_one_seed_gives_one_text_and_another_seed_another(lively, sample):
    arguments = lively, *ON_CPU, f'--prompt={PROMPT}', '--max_new_tokens=40'
    first, again, other = (sample(*arguments, f'--seed={seed}') for seed in (1, 1, 2))
    assert first.code == again.code == 0
    assert first.out == again.out != other.out
    assert first.out.startswith(PROMPT) and first.out.endswith('\n') and len(first.out) > len(PROMPT) + 20


def test_greedy_text_is_that_of_an_argmax_over_full_forwards(lively, sample):
    for n in (1, 40):
        assert sample(lively, *GREEDY, f'--prompt={PROMPT}', f'--max_new_tokens={n}').out == (
            greedy_by_full_forwards(lively, PROMPT, n) + '\n')


@pytest.mark.parametrize('prompt', [PROMPT, PROMPT + ' return x * 12345 # then' * 12], ids=['short', 'long'])
def test_text_longer_than_the_context_goes_on_from_the_newest_half(lively, sample, prompt):
    assert (len(load(lively)[1].encode(prompt)) > BLOCK) == (prompt != PROMPT)
    run = sample(lively, *GREEDY, f'--prompt={prompt}', '--max_new_tokens=100')
    assert run.out == greedy_by_full_forwards(lively, prompt, 100) + '\n'


def test_expanding_and_absorbing_give_the_same_greedy_text(lively, sample, monkeypatch):
    used, absorbs = [], attention.LatentAttention.absorbs
    monkeypatch.setattr(attention.LatentAttention, 'absorbs', lambda *a: used.append(absorbs(*a)) or used[-1])
    texts = {}
    for way in ('auto', 'expand', 'absorb'):
        used.clear()
        texts[way] = sample(lively, *GREEDY, f'--prompt={PROMPT}', '--max_new_tokens=50', f'--mla_decode={way}').out
        assert way == 'auto' or set(used) == {way == 'absorb'}
    assert texts['expand'] == texts['absorb'] == texts['auto'] and len(texts['auto']) > 50


def nucleus(logits, top_k, top_p, temperature):
    """Probabilities of the next token, one by one: top_k likeliest, of these the fewest that reach top_p together."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    likeliest, kept = sorted(range(len(p)), key=lambda i: -p[i])[:top_k], []
    total = sum(p[i] for i in likeliest)
    while sum(p[i] for i in kept) < top_p * total:
        kept.append(likeliest[len(kept)])
    return torch.tensor([p[i] if i in kept else 0 for i in range(len(p))])


@pytest.mark.parametrize('top_k, top_p', [(300, 0.5), (20, 0.9), (300, 0.99)])
def test_top_p_draws_from_the_fewest_likeliest_tokens_that_reach_it(lively, sample, top_k, top_p):
    model, tokenizer = load(lively)
    ids, generator, sizes = tokenizer.encode(PROMPT), torch.Generator().manual_seed(7), set()
    start = len(ids)
    for _ in range(30):
        with torch.no_grad():
            p = nucleus(model(torch.tensor([ids]))[0, -1], top_k, top_p, temperature=0.05)
        sizes.add(int((p > 0).sum()))
        ids.append(torch.multinomial(p, 1, generator=generator).item())
    run = sample(lively, *ON_CPU, f'--prompt={PROMPT}', '--max_new_tokens=30', '--seed=7', '--temperature=0.05',
                 f'--top_k={top_k}', f'--top_p={top_p}')
    assert run.out == shown(tokenizer, PROMPT, ids[start:]) and len(sizes) > 3


def test_no_top_k_means_all_tokens_and_a_top_k_of_one_the_likeliest(lively, sample):
    def text(*flags):
        return sample(lively, *ON_CPU, f'--prompt={PROMPT}', '--max_new_tokens=40', *flags).out
    everything = text('--top_k=0')
    assert everything == text('--top_k=1000') != text('--top_k=2')
    assert text('--top_k=1', '--temperature=5') == text('--temperature=0') == text('--top_p=1e-9') != everything


def test_a_static_cache_under_compile_gives_the_same_text(lively, sample, monkeypatch):
    shapes = []

    def compiled(function):                                 # the real one takes a minute; tested is what it is handed
        def wrapped(x, rope, cache):
            shapes.append((x.shape, rope[0].shape, cache.mask.shape, cache.slots.shape, cache.attended))
            return function(x, rope, cache)
        return wrapped
    monkeypatch.setattr(torch, 'compile', compiled)
    monkeypatch.setattr(machine, 'choose_compile', lambda wanted, *rest: wanted)
    arguments = lively, f'--prompt={PROMPT}', '--max_new_tokens=90', '--temperature=0', *ON_CPU[:2]
    eager, static = sample(*arguments, '--compile=False'), sample(*arguments, '--compile=True')
    assert eager.out == static.out and 'compiled' in static.err
    assert len(shapes) > 80 and len(set(shapes)) == 1       # nothing to compile a second time


def test_without_a_working_compiler_it_goes_on_without(trained, sample, monkeypatch):
    def broken(function):
        raise RuntimeError('no compiler')
    arguments = trained, f'--prompt={PROMPT}', '--max_new_tokens=20', *ON_CPU[:2]
    eager = sample(*arguments, '--compile=False')
    monkeypatch.setattr(torch, 'compile', lambda function: broken)
    run = sample(*arguments, '--compile=True')
    assert run.code == 0 and run.out == eager.out
    assert 'does not work here' in run.err and run.err.count('\n') == 2


# ---------------------------------------------------------------------------------------------------------------------
# Several samples, the end of the text, the prompt

def test_several_samples_are_the_rows_of_one_batch_below_lines_of_dashes(trained, sample):
    run = sample(trained, *ON_CPU, f'--prompt={PROMPT}', '--max_new_tokens=30', '--num_samples=3', '--seed=5')
    model, tokenizer = load(trained / 'checkpoint.pt')
    rows = torch.stack(list(generate(model, [tokenizer.encode(PROMPT)] * 3, 30, 0.8, 50, seed=5)), 1).tolist()
    assert rows[0] != rows[1] != rows[2]
    assert run.out == DASHES.join(shown(tokenizer, PROMPT, row) for row in rows)


def test_end_of_text_ends_a_sample_and_the_others_go_on(trained, sample, tmp_path):
    model, tokenizer = load(trained / 'checkpoint.pt')
    rows = torch.stack(list(generate(model, [tokenizer.encode(PROMPT)] * 2, 40, 0.8, 50, seed=3)), 1).tolist()
    for mine, other in ((0, 1), (1, 0)):                    # which sample is to end
        eot = next(token for token in rows[mine][5:] if token not in rows[other])
        path, tokenizer.eot = changed(trained, tmp_path, tokenizer=lambda state: {**state, 'eot': eot}), eot
        run = sample(path, *ON_CPU, f'--prompt={PROMPT}', '--max_new_tokens=40', '--num_samples=2', '--seed=3')
        assert run.out == DASHES.join(shown(tokenizer, PROMPT, row) for row in rows)
        decoded = sum(row.index(eot) if eot in row else 39 for row in rows)     # but for the token that the prompt gave
        assert f'then {decoded} tokens' in run.err
    once = next(generate(model, [tokenizer.encode(PROMPT)], 1, temperature=0)).item()
    path = changed(trained, tmp_path, tokenizer=lambda state: {**state, 'eot': once})
    run = sample(path, *GREEDY, f'--prompt={PROMPT}')
    assert run.code == 0 and run.out == PROMPT + '\n' and 'then 0 tokens' in run.err


def test_an_empty_prompt_starts_from_the_end_of_text(trained, sample):
    model, tokenizer = load(trained / 'checkpoint.pt')
    ids = [new.item() for new in generate(model, [[tokenizer.eot]], 30, 0.8, 50, seed=1)]
    assert sample(trained, *ON_CPU, '--max_new_tokens=30', '--seed=1').out == shown(tokenizer, '', ids)


def test_an_empty_prompt_starts_after_a_line_end_where_the_tokenizer_has_no_end_of_text(lively, sample, tmp_path):
    path = changed(lively, tmp_path, tokenizer=lambda state: {**state, 'eot': None})
    arguments = *ON_CPU, '--max_new_tokens=9'
    assert sample(path, *arguments, '--prompt=\n').out == '\n' + sample(path, *arguments).out != '\n'


def test_a_prompt_that_a_vocabulary_cannot_say_is_one_line(trained, sample, monkeypatch):
    def encode(self, text):
        raise ValueError('there is no \U0001f600 in this vocabulary')
    monkeypatch.setattr(Tokenizer, 'encode', encode)
    one_line(sample(trained, *ON_CPU, '--prompt=\U0001f600'), 'prompt 1: there is no \U0001f600')


def test_tokens_beyond_the_vocabulary_of_the_text_show_as_nothing(lively, sample, tmp_path):
    path = changed(lively, tmp_path, tokenizer=lambda state: {**state, 'tokens': state['tokens'][:256], 'eot': None})
    run = sample(path, *ON_CPU, f'--prompt={PROMPT}', '--max_new_tokens=60', '--top_k=0')
    assert run.code == 0 and run.out.startswith(PROMPT) and 'then 59 tokens' in run.err


def test_a_prompt_without_a_token_is_one_line(trained, sample, monkeypatch, tmp_path):
    monkeypatch.setattr(Tokenizer, 'encode', lambda self, text: [])     # a folder's may leave out what it does not know
    path = changed(trained, tmp_path, tokenizer=lambda state: {**state, 'eot': None})
    one_line(sample(path, *ON_CPU, '--prompt=\U0001f600'), 'prompt 1 has no token in this vocabulary')


def test_a_vocabulary_that_was_out_of_reach_in_training_is_looked_for_again(lively, sample, monkeypatch, tmp_path):
    tokenizer, arguments = load(lively)[1], (*GREEDY, f'--prompt={PROMPT}', '--max_new_tokens=20')
    path = changed(lively, tmp_path, tokenizer=None, config=lambda c: {**c, 'tokenizer': 'gpt2'})

    def get(name):
        ranks = {token: i for i, token in enumerate(tokenizer.tokens) if token is not None}
        return tiktoken.Encoding(name, pat_str=tokenizer.pattern, mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': tokenizer.eot})
    monkeypatch.setattr(tiktoken, 'get_encoding', get)
    assert sample(path, *arguments).out == sample(lively, *arguments).out

    def fail(name):
        raise OSError('no network')
    monkeypatch.setattr(tiktoken, 'get_encoding', fail)
    run = sample(path, *arguments)
    one_line(run, 'gpt2 is not in the cache', 'TIKTOKEN_CACHE_DIR')
    assert '--tokenizer' not in run.err                     # it was given


def test_a_prompt_from_a_file_or_standard_input_is_taken_as_it_stands(lively, sample, tmp_path, monkeypatch):
    text = 'class \u00e9:\n\n    pass \n'
    arguments = lively, '--max_new_tokens=20', *ON_CPU
    direct = sample(*arguments, f'--prompt={text}')
    assert direct.out.startswith(text) and len(direct.out) > len(text) + 5
    for encoding in ('utf-8', 'utf-8-sig', 'utf-16'):       # the latter two as Windows writes them, with a mark
        (tmp_path / 'a prompt.txt').write_bytes(text.encode(encoding))
        assert sample(*arguments, f'--prompt=FILE:{tmp_path / "a prompt.txt"}').out == direct.out
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=io.BytesIO(text.encode())))
    assert sample(*arguments, '--prompt=-').out == direct.out


def test_each_line_of_a_file_is_a_prompt_whose_texts_are_what_they_are_alone(lively, sample, tmp_path, monkeypatch):
    prompts = [PROMPT, 'class \u00e9\u2028 import', '  ' + 'return x * 12345 # then ' * 12, '\U0001f600 ']
    (tmp_path / 'prompts').write_bytes('\r\n'.join(['', *prompts[:2], ' ', *prompts[2:], '']).encode())
    arguments = lively, '--max_new_tokens=70', '--num_samples=2', *ON_CPU
    alone = [sample(*arguments, f'--prompt={prompt}').out for prompt in prompts]
    assert all(out.startswith(prompt) and out.count(DASHES + prompt) == 1 for out, prompt in zip(alone, prompts))
    run = sample(*arguments, f'--prompt=LINES:{tmp_path / "prompts"}')
    assert run.out == DASHES.join(alone)
    tokens = [len(load(lively)[1].encode(prompt)) for prompt in prompts]
    cut, statistics = run.err.splitlines()                  # one of them is longer than the context, and that is said
    assert cut == f'prompt 3 has {tokens[2]} tokens; the model sees the last {BLOCK}'
    assert statistics.startswith(f'prompts: {sum(min(n, BLOCK) for n in tokens)} tokens')
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=io.BytesIO(f'{PROMPT}\n'.encode())))
    assert sample(*arguments, '--prompt=LINES:-').out == alone[0]


def test_paths_may_begin_at_home(trained, sample, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(trained.parent))
    (trained.parent / 'words.txt').write_text('def')
    arguments = *ON_CPU, '--max_new_tokens=5'
    direct = sample(trained, *arguments, '--prompt=def')
    assert sample('~/run', *arguments, '--prompt=FILE:~/words.txt').out == direct.out


def test_the_best_checkpoint_is_taken_when_asked_for(trained, lively, sample, tmp_path):
    (tmp_path / 'checkpoint.pt').write_bytes((trained / 'checkpoint.pt').read_bytes())
    arguments = *GREEDY, f'--prompt={PROMPT}', '--max_new_tokens=9'
    last, best = sample(trained, *arguments).out, sample(lively, *arguments).out
    run = sample(tmp_path, '--checkpoint=best', *arguments)             # where the last is the best, no other is kept
    assert run.out == last
    (tmp_path / 'best.pt').write_bytes(lively.read_bytes())
    assert sample(tmp_path, '--checkpoint=best', *arguments).out == best != last
    assert sample(tmp_path, *arguments).out == last


# ---------------------------------------------------------------------------------------------------------------------
# A stop text

@pytest.mark.parametrize('pieces, stop, out', [
    (['one ', 'two', ' three', ' four'], 'two', 'one '),                    # a token of its own
    (['one t', 'w', 'o thr', 'ee four'], 'two th', 'one '),                 # spans tokens, amid them
    (['aab', 'aab', 'aaa', 'c'], 'aabaaa', 'aab'),                          # begins anew within its own beginning
    (['one', 'two '], 'three', 'onetwo '),                                  # does not come
    (['one', '\n', '\n', 'two'], '\n\n', 'one'),
    (['one ', 'th'], 'three', 'one th'),                                    # has only begun at the end
    (['say \u4e2d', '\u6587', 'x'], '\u6587', 'say \u4e2d'),
    (['one', 'two'], 'one', '')])
def test_a_stop_text_ends_the_text_before_it(sample, tmp_path, monkeypatch, pieces, stop, out):
    path, wire = reciter(tmp_path, [piece.encode() for piece in pieces]), Wire()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BufferedWriter(wire), encoding='utf-8'))
    run = sample(path, *GREEDY, f'--max_new_tokens={len(pieces)}', '--num_samples=2', f'--stop={stop}')
    assert run.code == 0 and b''.join(wire.pieces).decode() == f'{out}\n{DASHES}{out}\n'     # nothing is taken back
    whole = next((i for i in range(len(pieces)) if stop in ''.join(pieces[:i + 1])), len(pieces) - 1)
    assert f'then {2 * whole} tokens' in run.err            # none is made after the stop


def test_a_stop_text_does_not_hold_back_what_cannot_become_it(sample, tmp_path, monkeypatch):
    path, wire = reciter(tmp_path, [b'a', b'x', b'y', b'b', b'x', b'y', b'z', b'c']), Wire()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BufferedWriter(wire), encoding='utf-8'))
    sample(path, *GREEDY, '--max_new_tokens=8', '--stop=xyz')
    assert wire.pieces == [b'a', b'xyb', b'\n']


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's folders

def exported(path, folder):
    model, tokenizer = hf.from_run(path)
    hf.to_folder(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize('prompt', [PROMPT, '', '\u4e2d\u6587 \U0001f600', PROMPT * 20],
                         ids=['plain', 'empty', 'emoji', 'long'])
def test_a_folder_of_hugging_face_gives_the_text_of_the_run_it_was_made_of(lively, sample, tmp_path, prompt):
    pytest.importorskip('tokenizers')
    folder = exported(lively, tmp_path / 'theirs')
    for flags in (GREEDY, (*ON_CPU, '--top_p=0.9', '--num_samples=2', '--stop=\ufffd\ufffd')):
        run, ours = (sample(path, *flags, f'--prompt={prompt}', '--max_new_tokens=70') for path in (folder, lively))
        assert run.code == 0 and run.out == ours.out and len(run.out) > len(prompt) + 3


def test_a_vocabulary_with_marks_for_blanks_and_bytes_streams_whole_words(sample, tmp_path, monkeypatch):
    tokenizers = pytest.importorskip('tokenizers')         # sentencepiece's manner: Mixtral, Llama
    pieces = ['\u2581Hello', '\u2581world', 'ly', '<0xE4>', '<0xB8>', '<0xAD>', '\u2581end', ',']
    hf.to_folder(hf.from_run(reciter(tmp_path, [b'?'] * len(pieces)))[0], None, tmp_path / 'folder')
    words = tokenizers.models.WordLevel({piece: i for i, piece in enumerate(['</s>', *pieces])}, '</s>')
    theirs, decoders = tokenizers.Tokenizer(words), tokenizers.decoders
    theirs.decoder = decoders.Sequence([decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                        decoders.Strip(' ', 1, 0)])
    theirs.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend('\u2581'),
                                                         tokenizers.normalizers.Replace(' ', '\u2581')])
    theirs.save(str(tmp_path / 'folder' / 'tokenizer.json'))
    wire = Wire()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BufferedWriter(wire), encoding='utf-8'))
    assert sample(tmp_path / 'folder', *GREEDY, '--prompt=Hello', '--max_new_tokens=7').code == 0
    assert [piece.decode() for piece in wire.pieces] == ['Hello', ' world', 'ly', '\u4e2d', ' end', ',', '\n']


def test_what_is_wrong_with_a_folder_is_one_line(lively, sample, tmp_path, monkeypatch):
    folder = exported(lively, tmp_path / 'theirs')
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'tokenizers', None)      # not installed
        one_line(sample(folder, *ON_CPU), 'pip install tokenizers')
    (folder / 'tokenizer.json').unlink()
    one_line(sample(folder, *ON_CPU), 'has no tokenizer.json')
    (folder / 'config.json').write_text('{}')
    one_line(sample(folder, *ON_CPU), folder)


# ---------------------------------------------------------------------------------------------------------------------
# Streaming

def reciter(folder, pieces):
    """A checkpoint whose likeliest continuation of the end of text is these pieces of bytes, one token each.

    The blocks add nothing, so the logits of token i are E e_i up to a factor. With orthonormal u, e_i = 2.5^i (u_i +
    u_i+1) meets itself with 2, its successor with 2.5, its predecessor with 1/2.5 (times 2.5^2i), and no other.
    """
    n = len(pieces) + 1
    config = ModelConfig(vocab_size=n, block_size=64, n_layer=1, n_head=1, n_embd=n + 1 + (n + 1) % 2, d_ff=4,
                         n_expert=2, top_k=2)
    model = LanguageModel(config)
    with torch.no_grad():
        unit = torch.eye(config.n_embd)
        model.embed.weight.copy_(torch.stack([2.5**i * (unit[i] + unit[i + 1]) for i in range(n)]))
        model.layers[0].attn.o_proj.weight.zero_()
        model.layers[0].moe.down_proj.zero_()
    torch.save({'schema': SCHEMA, 'config': {'tokenizer': 'bytes'}, 'model_config': vars(config),
                'model': model.state_dict(), 'tokenizer': Tokenizer('bytes', [None, *pieces], eot=0).state()},
               folder / 'reciter.pt')
    return folder / 'reciter.pt'


class Wire(io.RawIOBase):
    """What reaches the operating system, piece by piece."""

    def __init__(self):
        self.pieces = []

    def writable(self):
        return True

    def write(self, data):
        self.pieces.append(bytes(data))
        return len(data)


@pytest.mark.parametrize('size', [1, 2, 3, 5])
def test_streaming_never_splits_a_character(sample, tmp_path, monkeypatch, size):
    text = 'h\u00e9 \u4e2d\u6587 \U0001f600\U0001f44d\u00f1 ok'
    data = text.encode()
    pieces = [data[i:i + size] for i in range(0, len(data), size)]
    path, wire = reciter(tmp_path, pieces), Wire()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BufferedWriter(wire), encoding='utf-8'))
    assert sample(path, *GREEDY, f'--max_new_tokens={len(pieces)}').code == 0
    shown = [piece.decode('utf-8') for piece in wire.pieces]            # raises at a split character
    assert ''.join(shown) == text + '\n'
    if size == 1:
        assert shown == [*text, '\n']                       # every character as soon as its last byte is there
    else:
        assert len(shown) > len(pieces) // 2                # not all at once at the end


def test_a_character_cut_off_by_the_last_token_is_shown_as_unknown(sample, tmp_path):
    pieces = [bytes([byte]) for byte in 'a\U0001f600'.encode()]
    path = reciter(tmp_path, pieces)
    assert sample(path, *GREEDY, '--max_new_tokens=5').out == 'a\U0001f600\n'
    assert sample(path, *GREEDY, '--max_new_tokens=4').out == 'a\ufffd\n'


def test_a_reader_that_leaves_early_ends_it_quietly(lively):
    process = python('sample.py', lively, *ON_CPU, '--prompt=def', '--max_new_tokens=1000000000')
    assert process.stdout.read(3) == b'def'
    process.stdout.close()
    process.stdout = None
    run = ended(process)
    assert run.code == 0 and run.err == ''


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no named pipes')
def test_control_c_ends_it_quietly_with_the_statistics(lively, tmp_path):
    out, err = tmp_path / 'out', tmp_path / 'err'
    os.mkfifo(out)
    process = forked.start(['sample.py', lively, *ON_CPU, '--prompt=def', '--max_new_tokens=1000000000', '--num_samples=2'],
                           streams=(out, err))
    with open(out, encoding='utf-8') as pipe:
        assert len(pipe.read(40)) == 40                     # under way
        os.kill(process.pid, signal.SIGINT)
        rest = pipe.read()
    process.join(60)
    statistics = err.read_text()
    assert process.exitcode == 130 and statistics.count('\n') == 1 and 'tokens/s' in statistics
    assert f'\n{DASHES}def' in rest                         # the other sample as far as it got


def test_a_terminal_that_lacks_a_character_shows_another(trained, sample, monkeypatch):
    wire = Wire()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BufferedWriter(wire), encoding='cp1252'))
    assert sample(trained, *GREEDY, '--prompt=\u4e2d\u6587 def', '--max_new_tokens=1').code == 0
    assert b''.join(wire.pieces).startswith(b'?? def')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
def test_a_full_disk_is_told_in_one_line(trained, sample, monkeypatch):
    with open('/dev/full', 'w') as full:
        monkeypatch.setattr(sys, 'stdout', full)
        one_line(sample(trained, *ON_CPU, '--prompt=def'), 'cannot be written')


# ---------------------------------------------------------------------------------------------------------------------
# The statistics

@pytest.mark.parametrize('dtype, width', [('float32', 4), ('bfloat16', 2)])
@pytest.mark.parametrize('new, slots', [(20, 21), (70, BLOCK)])
def test_the_statistics_tell_the_bytes_that_the_cache_has(lively, sample, monkeypatch, dtype, width, new, slots):
    caches, new_cache = [], LanguageModel.new_cache
    monkeypatch.setattr(LanguageModel, 'new_cache', lambda *a, **k: caches.append(new_cache(*a, **k)) or caches[-1])
    run = sample(lively, '--device=cpu', '--compile=False', f'--dtype={dtype}', f'--max_new_tokens={new}',
                 '--num_samples=2', '--top_k=2')
    found = re.search(rf'cache: ([\d,]+) bytes .* ([\d,]+) bytes a token at {width} bytes a number', run.err)
    total, each = (int(number.replace(',', '')) for number in found.groups())
    config = load(lively)[0].config
    assert each == config.n_layer * (config.kv_lora_rank + config.qk_rope_head_dim) * width
    assert total == max(cache.bytes() for cache in caches) == 2 * slots * each
    assert float(re.search(r'([\d,.]+) tokens/s', run.err).group(1).replace(',', '')) > 0
    assert run.err.count('\n') == 1


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit status 2

@pytest.mark.parametrize('flag, words', [
    ('out/none', 'out/none is not there: no such run folder'), ('~nobody-here/run', '~nobody-here/run is not there'),
    ('x' * 300, 'is not there'), ('--prompt=', 'which run?')])
def test_a_run_that_is_not_there_is_one_line_without_importing_torch(tmp_path, flag, words):
    (tmp_path / 'torch.py').write_text('raise SystemExit(77)\n')
    one_line(ended(python('sample.py', flag, env={'PYTHONPATH': str(tmp_path)})), words)


def damaged(trained, folder, kind):
    """-> path of a checkpoint that is damaged in this way."""
    objects = {'text': b'no checkpoint\n' * 99, 'weights': {'w': torch.zeros(2)},
               'code': {'schema': SCHEMA, 'model': Touch(folder / 'touched')}}
    entries = {'schema': {'schema': SCHEMA + 1}, 'no tokenizer': {'tokenizer': None, 'config': {'tokenizer': 'bpe'}},
               'odd tokenizer': {'tokenizer': {'name': 'x'}},
               'large tokenizer': {'tokenizer': Tokenizer('bytes', [b'a'] * 400).state()},
               'config': {'model_config': {'width': 3}}, 'sizes': {'model_config': lambda c: {**c, 'n_embd': 63}},
               'other model': {'model_config': lambda c: {**c, 'n_layer': 3}}}
    if kind in entries:
        return changed(trained, folder, **entries[kind])
    path, content = folder / 'bad.pt', objects[kind]
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return path


class Touch:
    """Unpickled with code allowed, this leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('kind, words', [
    *((kind, 'is no sound checkpoint of train.py') for kind in ('text', 'code', 'weights', 'odd tokenizer', 'other model')),
    ('schema', f'has schema {SCHEMA + 1}'), ('no tokenizer', 'no tokenizer'),
    ('large tokenizer', 'has 300 tokens, its tokenizer 400'), ('config', 'width'), ('sizes', 'n_embd')])
def test_a_checkpoint_that_is_not_ours_or_not_whole_is_one_line(trained, sample, tmp_path, kind, words):
    path = damaged(trained, tmp_path, kind)
    one_line(sample(path, *ON_CPU, '--prompt=a'), path, words)
    assert not (tmp_path / 'touched').exists()


@pytest.mark.parametrize('flag, words', [
    ('--max_new_tokens=0', 'at least 1'), ('--num_samples=0', 'at least 1'), ('--top_k=-1', 'top_k (-1) must be'),
    ('--top_p=0', 'top_p (0.0) above 0'), ('--top_p=1.5', 'at most 1'), ('--temperature=-1', 'temperature (-1.0)'),
    ('--device=cuda:99', 'no cuda:99'), ('--prompt=\udcff', 'not UTF-8'), ('--stop=\udcff', '--stop is not UTF-8'),
    ('--prompt=FILE:/no/such', 'No such file'),
    ('--prompt=FILE:/', 'cannot be read'), ('--prompt=FILE:', 'cannot be read'), ('--prompt=FILE:~nobody-here/x', 'No such file')])
def test_a_knob_out_of_range_is_one_line(trained, sample, flag, words):
    one_line(sample(trained, '--dtype=float32', flag), words)


def test_out_of_memory_is_one_line(trained, sample, monkeypatch):
    def new_cache(*arguments, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')
    monkeypatch.setattr(LanguageModel, 'new_cache', new_cache)
    monkeypatch.setattr(machine, 'choose_compile', lambda *arguments: compiled)
    for compiled in (False, True):                          # which makes a trial first
        run = sample(trained, *ON_CPU, '--num_samples=2000', '--max_new_tokens=9')
        assert run.code == 2 and run.err.count('\n') == 1 and '2,000 samples of up to 9 tokens' in run.err


def test_a_prompt_file_that_is_not_utf_8_is_one_line(trained, sample, tmp_path):
    (tmp_path / 'latin.txt').write_bytes('caf\u00e9'.encode('latin-1'))
    one_line(sample(trained, *ON_CPU, f'--prompt=FILE:{tmp_path / "latin.txt"}'), 'not UTF-8')


def test_a_folder_without_a_checkpoint_is_one_line(sample, tmp_path):
    one_line(sample(tmp_path, *ON_CPU), tmp_path / 'checkpoint.pt', 'nothing was saved in it yet')
    (tmp_path / 'mla-s0').mkdir()
    (tmp_path / 'mla-s0' / 'checkpoint.pt').touch()         # it was an experiment's folder
    one_line(sample(tmp_path, *ON_CPU), f'did you mean {tmp_path / "mla-s0"}?')


def test_a_way_to_decode_latents_is_refused_where_there_are_none(sample, tmp_path):
    path = reciter(tmp_path, [b'a', b'b'])                  # multi-head attention
    one_line(sample(path, *GREEDY, '--mla_decode=absorb'), '--mla_decode=absorb', 'MultiHeadAttention')
    assert sample(path, *GREEDY, '--max_new_tokens=2').out == 'ab\n'
