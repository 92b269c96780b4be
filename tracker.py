"""--tracker=wandb|tensorboard: the numbers of the log line and of evaluations, where people are used to look at them.

The run's folder keeps all that counts, a tracker is a window on it. One that fails says so once and is left alone.
"""
import hashlib
import importlib.util
import json

from configurator import fail, say


def flat(values, prefix=''):
    """{'a': 1, 'b': {'c': 2}, 'd': None} -> {'a': 1, 'b/c': 2}: the numbers of a record by name."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f'{prefix}{key}/')
        elif isinstance(value, (int, float)):
            found[prefix + key] = value
    return found


class Tracker:
    """kind '': does nothing. folder: of the run; result: its result so far, with name, config and started."""

    def __init__(self, kind, folder, result):
        self.kind = kind
        self.attempt(self.start, folder, result)

    def attempt(self, call, *arguments):
        try:
            if self.kind:
                call(*arguments)
        except Exception as error:                          # a service that is away, a full disk, another version
            reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
            say(f'--tracker={self.kind} failed ({reason}); going on without')
            self.kind = ''

    def start(self, folder, result):
        config = result['config']
        if self.kind == 'wandb':                            # $WANDB_MODE=offline needs no account
            import wandb
            key = f'{folder.resolve()} {result["started"]}'             # a run that goes on is the same one there
            self.run = wandb.init(
                project=config['experiment'], name=f'{result["name"]}-s{config["seed"]}', config=config, dir=folder,
                id=hashlib.sha256(key.encode()).hexdigest()[:16], resume='allow')
        else:
            from torch.utils.tensorboard import SummaryWriter
            done = result['history'][-1]['step'] if result['history'] else 0       # what came after it is done again
            self.run = SummaryWriter(folder / 'tensorboard', purge_step=done + 1)
            self.run.add_text('config', '```\n' + json.dumps(config, indent=1) + '\n```')

    def log(self, record, figures=None):
        """A row of the history, and what an evaluation found."""
        self.attempt(self.send, record['step'], flat(record) | flat(figures or {}))

    def send(self, step, numbers):
        if self.kind == 'wandb':
            self.run.log(numbers, step=step)
        else:
            for name, value in numbers.items():
                self.run.add_scalar(name, value, step)
            self.run.flush()

    def finish(self, final):
        """The end of a run: its last numbers."""
        self.attempt(self.send, final['step'], flat(final, 'final/'))
        self.attempt(lambda: self.run.finish() if self.kind == 'wandb' else self.run.close())


def check(kind):
    """Fails, before anything slow, if the package is not installed."""
    if kind and importlib.util.find_spec(kind) is None:
        fail(f'--tracker={kind} needs the package {kind}: pip install {kind}')
