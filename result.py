"""What a run's folder holds. train.py writes it, analyze.py reads it and compares, without torch.

    folder = RunFolder('out/laptop/lora-s0')
    checkpoint = folder.open(config, data, resume='auto')       # what to go on from; or one line and the end
    folder.write_checkpoint(content), folder.write_result(result)

    arms = load('out/laptop', 'baseline')               # {arm: {seed: run}}: an arm is the runs of one name
    for line in disagreements(arms, 'baseline'): ...    # what they differ in beyond variant and seed

The README describes the fields ("Read a result").
"""
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

from configurator import fail, run_knobs, say

SCHEMAS = {1: 'every weight N(0, 0.02), router losses averaged over the layers',
           2: 'weights by fan-in, router losses summed over the layers'}
SCHEMA = max(SCHEMAS)                               # of the result.json and checkpoint.pt that are written
STATUSES = ('running', 'complete', 'interrupted', 'diverged')
NAME_LENGTH = 60                                    # of a run's name, at most: what fits a table
# May differ between a run and its continuation: these change numbers by rounding at most, or only say where things lie. The
# data may have another name, not another hash
INDIFFERENT = {'resume', 'overwrite', 'out_dir', 'data_root', 'micro_batch_size', 'log_interval', 'checkpoint_interval',
               'eval_interval', 'compile', 'shard', 'tracker', 'dataset', 'text_field', 'extended_at'}


# ---------------------------------------------------------------------------------------------------------------------
# Writing: the folder of one run

def folder_of(out_dir, experiment, name, seed):
    """-> the path of a run's folder. Fails at names that fit no table or lead out of out/."""
    for knob, text in (('name', name), ('experiment', experiment)):
        if len(text) > NAME_LENGTH or not text.isprintable() or not text.strip('. ') or '/' in text or '\\' in text:
            fail(f'--{knob}={ascii(text)[1:-1]}: must be 1 to {NAME_LENGTH} printable characters, not all blanks and '
                 'dots, without / and \\; --out_dir=FOLDER goes anywhere')
    return Path(os.path.expanduser(out_dir) or f'out/{experiment}/{name}-s{seed}')


class RunFolder:
    """The folder of one run: what is there already, and what the run leaves there (the files: see train.py)."""

    def __init__(self, path):
        self.path = Path(path)
        self.result, self.checkpoint = self.path / 'result.json', self.path / 'checkpoint.pt'
        self.best_file = self.path / 'best.pt'
        self.best = self.saved = None               # {'step', 'val_loss'} of the best checkpoint; step of the last one

    def open(self, config, data, resume=False, overwrite=False, writer=True, mmap=False):
        """-> the checkpoint to go on from, or None to start at the beginning. Ends the program if neither is right.

        config, data: of this run, as they will stand in its result; config gets `extended_at`, the steps at which a
        run was given more updates. resume: True, False or 'auto' (if there is anything to go on with). writer: this
        process locks the folder. mmap: see read_checkpoint.
        """
        there = os.path.exists(self.result) or os.path.exists(self.checkpoint)      # False where one may not look, too
        if resume is True and not there:
            fail(f'{self.path} holds no run to go on with; --resume=auto starts one where there is none')
        if writer:
            self.lock()
        if overwrite:
            if writer:                                      # or a later --resume=True would find what was there before
                for file in (self.result, self.checkpoint, self.best_file):
                    file.unlink(missing_ok=True)
                shutil.rmtree(self.path / 'tensorboard', ignore_errors=True)
            return None
        if self.result.exists():
            try:
                before = read_run(self.result)
            except ValueError as error:
                fail(f'{error}; --overwrite=True replaces it')
            self.compare(before, config, data)
            if before['status'] == 'diverged':
                say(f'{self.path} diverged ({before.get("error")}); --overwrite=True runs it again')
                raise SystemExit(3)
            if before['status'] == 'complete':
                if not resume:
                    fail(f'{self.path} holds a finished run; --overwrite=True runs it again, --out_dir=... goes elsewhere, '
                         '--resume=True with a larger --max_steps goes on with it')
                if config['max_steps'] <= before['config']['max_steps']:
                    say(f'{self.path} is complete already; a larger --max_steps goes on with it')
                    raise SystemExit(0)
                if not self.checkpoint.exists():
                    fail(f'{self.path} holds a finished run, but no checkpoint.pt to go on from; --overwrite=True runs it again')
        if there and not resume:
            fail(f'{self.path} holds an unfinished run; --resume=True goes on with it, --overwrite=True starts again')
        if not self.checkpoint.exists():
            if there:
                say(f'{self.path} has no checkpoint yet: from the beginning')
            return None
        try:
            checkpoint = read_checkpoint(self.checkpoint, mmap)
        except ValueError as error:
            fail(f'{error}; --overwrite=True starts again')
        if checkpoint['schema'] != SCHEMA:
            fail(f'{self.checkpoint} has schema {checkpoint["schema"]}, here it is {SCHEMA}; --overwrite=True starts again')
        self.compare(checkpoint, config, data)
        before, step = checkpoint['config'], checkpoint['step']
        extended = before.get('extended_at', []) + [step] * (config['max_steps'] > before['max_steps'])
        if extended:
            config['extended_at'] = extended
        self.best, self.saved = checkpoint.get('best'), step
        if writer and self.best and self.best['step'] == step:          # killed before an older best.pt was taken away
            self.best_file.unlink(missing_ok=True)
        return checkpoint

    def lock(self):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.held = open(self.path / '.lock', 'w')
            with suppress(ImportError):
                import fcntl                                # not on Windows, where nothing guards the folder
                fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)       # let go of when this process ends
        except BlockingIOError:
            fail(f'another process is writing to {self.path}; wait for it, or go elsewhere with --out_dir=...')
        except OSError as error:
            fail(f'{self.path} cannot be written to ({error.strerror}); go elsewhere with --out_dir=...')

    def compare(self, before, config, data):
        """Fails unless what lies in the folder is this run: by its config, and its data by the hashes."""
        old, new = with_defaults(before['config']), with_defaults(config)
        same = INDIFFERENT | VARIANT - old.keys()
        if new['max_steps'] > old['max_steps']:             # a run may be given more updates
            same.add('max_steps')
        different = [f'{k}: {old.get(k, "absent")} there, {new.get(k, "absent")} here'
                     for k in sorted((new.keys() | old.keys()) - same) if old.get(k) != new.get(k)]
        if different:
            fail(f'{self.path} holds a run of another config ({", ".join(different)}); --overwrite=True replaces it, '
                 '--out_dir=... goes elsewhere')
        old = before.get('data', {})
        hashes = [k for k in (*TOKENS, 'vocab_sha256') if None not in (old.get(k), data[k])]
        different = [f'{k}: {str(old[k])[:12]} there, {str(data[k])[:12]} here' for k in hashes if old[k] != data[k]]
        if different:
            fail(f'{self.path} holds a run on other data ({", ".join(different)}): the text, the vocabulary or how '
                 'much of it is used has changed; --overwrite=True starts again')

    def write_result(self, result):
        from machine import write_atomically
        file = 'checkpoint.pt' if self.best and self.best['step'] == self.saved else 'best.pt'
        result = {**result, 'best': self.best and {**self.best, 'file': file}}
        result = json.loads(json.dumps(result), parse_constant=lambda name: None)       # NaN, infinity: JSON has none
        text = json.dumps(result, indent=1, allow_nan=False) + '\n'
        write_atomically(self.result, lambda file: file.write(text.encode()))

    def write_checkpoint(self, content):
        """checkpoint.pt, and `best` in it. If what it replaces is the best so far, that becomes best.pt first."""
        import torch
        from machine import write_atomically
        step, final = content['step'], content['final'] or {}
        loss = final['val_loss'] if final.get('step') == step else math.inf         # evaluated at this very step
        if loss < (self.best['val_loss'] if self.best else math.inf):
            self.best = {'step': step, 'val_loss': loss}
        elif self.best and self.best['step'] == self.saved != step:
            with open(self.checkpoint, 'rb') as last:       # a copy: at every moment there is a whole checkpoint.pt
                write_atomically(self.best_file, lambda file: shutil.copyfileobj(last, file))
        write_atomically(self.checkpoint, lambda file: torch.save({**content, 'best': self.best}, file))
        self.saved = step
        if self.best and self.best['step'] == step:
            self.best_file.unlink(missing_ok=True)


def command_to_go_on(overwrite=False, **knobs):
    """The command line of this program with --resume=True and these knobs, ready to be pasted into a shell."""
    knobs = {'resume': True, **knobs}
    if overwrite:
        knobs['overwrite'] = False                          # also where it is a config file that asks for it
    arguments = [a for a in sys.argv if a.partition('=')[0].removeprefix('--') not in knobs]
    processes = os.environ.get('WORLD_SIZE', '1')
    launcher = [sys.orig_argv[0]] if processes == '1' else ['torchrun', f'--nproc_per_node={processes}']
    return shlex.join(launcher + arguments + [f'--{k}={v}' for k, v in knobs.items()])


# ---------------------------------------------------------------------------------------------------------------------
# Reading checkpoints

def read_checkpoint(path, mmap=False):
    """A run's folder, or a checkpoint file -> what train.py saved, on the CPU. ValueError if it is damaged or foreign.

    No code from the file runs. torch.save stores a CRC-32 of each record, which torch.load does not look at: a flipped
    bit would become a weight. mmap: tensors stay in the file until they are touched; several processes share one copy.
    """
    import torch
    path = Path(os.path.expanduser(path))
    file = path / 'checkpoint.pt' if path.is_dir() else path
    if not file.exists():
        raise ValueError(f'{path} holds no checkpoint.pt' if path.is_dir() else f'{path} is not there')
    try:
        with zipfile.ZipFile(file) as archive:              # about 1 GB/s
            # a record with attributes may pass for a folder, of which torch.load reads nothing: a tensor of stale memory
            if archive.testzip() is not None or any(record.external_attr for record in archive.infolist()):
                raise zipfile.BadZipFile('a record is damaged')
        content = torch.load(file, map_location='cpu', weights_only=True, mmap=mmap)
        if content['schema'] not in SCHEMAS:
            raise ValueError(f'it has schema {content["schema"]}, this program reads up to {SCHEMA}')
        return content
    except Exception as error:                              # whatever a damaged or foreign file makes torch raise
        raise ValueError(f'{file} is no sound checkpoint of train.py ({type(error).__name__}: '
                         f'{str(error).partition(chr(10))[0]})') from None


def read_weights(path, given):
    """--init_from=PATH -> (fields of ModelConfig, weights by name, same_vocabulary, SHA-256 of the files).

    PATH: a run's folder, a checkpoint file, or a Hugging Face folder. same_vocabulary(tokenizer): whether a Tokenizer,
    or None where token files have none, gives the ids of these weights. given: {knob: value} of flags and config
    files; they must agree with what is read, except context and rotary positions, which have no weights.
    """
    import hf
    import numpy as np
    path = Path(os.path.expanduser(path))
    try:
        if (path / 'config.json').exists():
            model = hf.from_folder(path)
            files = sorted(file for file in path.iterdir()
                           if file.suffix in ('.json', '.safetensors') and file.stat().st_size)        # none maps to nothing
            same_vocabulary = lambda tokenizer: hf.has_vocabulary(path, tokenizer)
        else:
            (model, own), files = hf.from_run(path), [path / 'checkpoint.pt' if path.is_dir() else path]
            same_vocabulary = lambda tokenizer: not own or tokenizer is not None and tokenizer.sha256() == own.sha256()
    except ValueError as error:
        fail(f'--init_from: {error}')
    network, digest = vars(model.config), hashlib.sha256()
    trained = network['block_size']
    for file in files:
        digest.update(np.memmap(file, mode='r'))
    for knob, value in given.items():
        if knob in network and knob != 'vocab_size' and value not in (None, network[knob]):
            if not knob.startswith(('rope_', 'block_size')):
                fail(f'--{knob}={value} is not what {path} has: {network[knob]}')
            network[knob] = value
    if network['rope_scaling'] in ('dynamic', 'yarn'):      # stretch from the context that the weights know
        network['rope_original_context'] = network['rope_original_context'] or trained
    return network, model.state_dict(), same_vocabulary, digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Reading: what analyze.py computes with is checked here, once, so that later code meets no surprise

FIELDS = {field: kind for kind, fields in {         # final.* are needed in complete runs only
    'an object': 'config model data environment environment.source_sha256',
    'a list': 'history final.expert_load',
    'a line of text': 'name config.optimizer config.dtype model.attention_class data.dataset data.tokenizer '
                      'data.train_sha256 data.val_sha256 environment.device_name environment.torch',
    'a whole number': 'config.seed config.n_layer config.n_head config.n_embd config.d_ff config.n_expert config.top_k '
                      'config.block_size config.batch_size config.max_steps config.warmup_steps data.vocab_size '
                      'data.train_tokens data.val_tokens environment.world_size',
    'a number': 'config.learning_rate model.params_total model.params_active model.kv_cache_bytes_per_token_16bit '
                'data.uniform_loss data.unigram_loss final.val_loss final.val_accuracy',
    'a number or null': 'environment.threads final.val_perplexity final.val_bits_per_byte final.peak_memory_gb '
                        'final.max_violation final.router_entropy final.balance_loss final.z_loss',
}.items() for field in fields.split()}


def check(value, field, kind, within=''):
    """The dotted field of an object; ValueError, naming the field, if it is not there or not of that kind."""
    for part in field.split('.'):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f'lacks the field {within}{field}')
        value = value[part]
    number = type(value) in (int, float) and abs(value) < 1e150         # false for NaN
    if not {'an object': isinstance(value, dict), 'a list': isinstance(value, list),
            'a line of text': isinstance(value, str) and value.isprintable() and value.strip(),
            'a whole number': number and type(value) is int and value >= 0,
            'a number': number, 'a number or null': number or value is None}[kind]:
        raise ValueError(f'{within}{field} is {json.dumps(value)[:60]}, expected {kind}')
    return value


def read_run(file):
    """One result file -> its object plus `file` and `seed`. ValueError, naming file and field, if unsound."""
    try:
        run = json.loads(Path(file).read_text(encoding='utf-8'))
        if (schema := check(run, 'schema', 'a whole number')) not in SCHEMAS:
            raise ValueError(f'schema is {schema}, this program reads {" and ".join(map(str, SCHEMAS))}')
        if (status := check(run, 'status', 'a line of text')) not in STATUSES:
            raise ValueError(f'status is {status[:60]}, expected one of {", ".join(STATUSES)}')
        for field, kind in FIELDS.items():
            if status == 'complete' or not field.startswith('final.'):
                check(run, field, kind)
        for i, row in enumerate(run['history']):
            check(row, 'step', 'a whole number', f'history[{i}].')
            for field in ('val_loss', 'train_loss'):
                check(row, field, 'a number or null', f'history[{i}].')
        load = run['final']['expert_load'] if status == 'complete' else []
        if not all(isinstance(layer, list) and len(layer) == len(load[0]) and all(
                type(x) in (int, float) and 0 <= x <= 1 for x in layer) and sum(layer) > 0 for layer in load):
            raise ValueError('final.expert_load is not a list of layers with the share of each expert')
    except OSError as error:
        raise ValueError(f'{file} cannot be read ({error.strerror})') from None
    except (ValueError, RecursionError) as error:           # no JSON, perhaps cut off; or one of the above
        raise ValueError(f'{file} is no sound result of train.py ({error})') from None
    return {**run, 'config': with_defaults(run['config']), 'file': file, 'seed': run['config']['seed']}


def load(path, baseline=None):
    """Every run at or below the path -> {arm: {seed: run}}: baseline first, then from the largest cache down."""
    if not os.path.isdir(path):
        there = [Path(path).parent] if os.path.isfile(path) else [
            folder for folder in (Path('out', path), Path('results', path)) if folder.is_dir()]
        fail(f'{path}: no such folder; ' + (f'did you mean {" or ".join(map(str, there))}?' if there else
                                            'train.py makes runs, reproduce.sh all of them'))
    files = sorted(
        os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
        if name == 'result.json' or re.search(r'-s\d+\.json$', name))
    arms, first = {}, {}
    for file in files or fail(f'{path}: no result files below it (result.json or <name>-s<seed>.json)'):
        try:
            run = read_run(file)
        except ValueError as error:
            fail(error)
        if (twin := arms.setdefault(run['name'], {}).setdefault(run['seed'], run)) is not run:
            fail(f'{twin["file"]} and {file} are both {run["name"]} seed {run["seed"]}; if these are two'
                 ' experiments, name the folder of one')
        first.setdefault(run['schema'], file)
    if len(first) > 1:
        fail('not comparable, keep them in two folders: ' + ', '.join(
            f'{file} is of schema {schema} ({SCHEMAS[schema]})' for schema, file in sorted(first.items())))
    if baseline is not None and baseline not in arms:
        fail(f'{path}: no runs named {ascii(baseline)}, the baseline; there are {", ".join(sorted(arms)[:20])};'
             ' --baseline=... takes one of them')

    def order(name):
        model = next(iter(arms[name].values()))['model']
        return (name != baseline, -model['kv_cache_bytes_per_token_16bit'], model['params_total'], name)
    return {name: dict(sorted(arms[name].items())) for name in sorted(arms, key=order)}


# ---------------------------------------------------------------------------------------------------------------------
# Comparability: runs may differ in the variant's knobs and the seed, in nothing else

NETWORK, REST = run_knobs()
DEFAULTS = {name: knob.default for name, knob in {**NETWORK, **REST}.items()}
VARIANT = {'attn'} | {name for name, knob in NETWORK.items() if knob.default is None}   # what is being compared
# `data` says what came of these
DATA = {'vocab_size'} | {name for name, knob in REST.items() if knob.section.startswith('Data')}
BOOKKEEPING = (INDIFFERENT - {'extended_at'}) | DATA | {'name', 'seed', 'experiment'}    # may differ between runs
TOKENS = ('train_sha256', 'val_sha256', 'train_tokens', 'val_tokens', 'vocab_size')     # of data: not names, not paths


def with_defaults(config):
    """A config, and in it the defaults of knobs that are younger than its run; not those that the variant's row fills in."""
    return config | {knob: default for knob, default in DEFAULTS.items() if knob not in VARIANT | config.keys()}


def complete(arm):
    return {seed: run for seed, run in arm.items() if run['status'] == 'complete'}


def spans(seeds):
    """[0, 1, 2, 5] -> '0-2, 5'."""
    parts = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ', '.join(str(a) if a == b else f'{a}-{b}' for a, b in parts) or 'none'


def who(runs):
    """Some runs -> 'baseline seeds 0-7; lora seed 3'."""
    seeds = {}
    for run in runs:
        seeds.setdefault(run['name'], []).append(run['seed'])
    return '; '.join(f'{name} seed{"s" * (len(s) > 1)} {spans(s)}' for name, s in seeds.items())


def differing(runs, part, key):
    """'' if all runs have the same run[part][key], else 'value (runs) against value (runs)'."""
    groups = {}
    for run in runs:
        if key in run[part]:
            groups.setdefault(json.dumps(run[part][key], sort_keys=True), []).append(run)
        elif part == 'config' and key not in VARIANT:       # no fact that was not recorded, no knob that its row fills in
            groups.setdefault('absent', []).append(run)
    named = [f'{value[:80]} ({who(group)})' for value, group in groups.items()]
    return ' against '.join(named) if len(named) > 1 else ''


def disagreements(arms, baseline, may_differ=(), metric='val_loss'):
    """What keeps the runs from being comparable, as texts naming field, values and runs. Empty: comparable.

    Over all runs: the tokens, device, torch, every knob but the variant's and bookkeeping; over complete runs: the
    budget they used. Within an arm (and its A/A twin): the model, the variant's knobs and what may_differ names.
    Bits per byte compare tokenizers: there the text has to be one over all runs, the tokens within an arm.
    """
    runs = [run for arm in arms.values() for run in arm.values()]
    keys = {part: sorted({key for run in runs for key in run[part]}) for part in ('config', 'model')}
    by_text = metric == 'val_bits_per_byte' and all(run['data'].get('val_text_sha256') for run in runs)
    networks, own, may_differ = {}, {*VARIANT, *may_differ}, set(may_differ)
    for run in runs:
        networks.setdefault(baseline if run['name'] == f'{baseline}-again' else run['name'], []).append(run)
    finished = [run for run in runs if run['status'] == 'complete']
    budget = {'updates': {'max_steps'}, 'tokens': {'max_steps', 'batch_size', 'block_size'}}
    checks = [(runs, 'config', key) for key in keys['config'] if key not in own | BOOKKEEPING]
    checks += [(runs, 'data', key) for key in (('val_text_sha256',) if by_text else TOKENS) if key not in may_differ]
    checks += [(runs, 'environment', key) for key in ('device_name', 'torch') if key not in may_differ]
    checks += [(finished, 'final', key) for key, knobs in budget.items() if not knobs & may_differ]
    for same in networks.values():
        checks += [(same, 'config', key) for key in keys['config'] if key in own]
        checks += [(same, 'model', key) for key in keys['model']] + [(same, 'data', key) for key in TOKENS if by_text]
    return [f'{part}.{ascii(key)[1:-1]}: {text}' for some, part, key in checks if (text := differing(some, part, key))]
