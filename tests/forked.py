"""A program of the repository in a process of its own, forked from one that has imported torch already.

Importing torch takes a fresh interpreter seconds, and the suite starts many. Where the start itself, the shell, a terminal or
a signal is what is tested, the tests start an interpreter as users do.
"""
import multiprocessing
import os
import runpy
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# torch._dynamo: torch.optim imports it, on its first use
PRELOADED = ['torch', 'torch._dynamo', 'torch.distributed.checkpoint.state_dict', 'torch.distributed.fsdp', 'numpy']
DRAWING = ['matplotlib.figure', 'matplotlib.backends.backend_agg']         # for analyze.py; passed over where they are not installed


def child(arguments, cwd, streams, environment):
    """What `python arguments...` does, with stdout and stderr going to the ends of two files."""
    os.chdir(cwd)
    os.environ.update(environment)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, 'w', encoding='utf-8'), open(2, 'w', encoding='utf-8', buffering=1)
    sys.argv, sys.path[:0] = arguments, ['' if arguments[0] == '-c' else str(Path(arguments[0]).resolve().parent)]
    if arguments[0] == '-c':
        exec(arguments[1], {'__name__': '__main__'})
    else:
        runpy.run_path(arguments[0], run_name='__main__')


def start(arguments, cwd=REPOSITORY, streams=(os.devnull, os.devnull), **environment):
    """-> multiprocessing.Process, started."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED + DRAWING)
    process = context.Process(target=child, args=([str(argument) for argument in arguments], str(cwd), streams, environment))
    process.start()
    return process


def on_a_terminal(*arguments, timeout=100):
    """Run it with a terminal as stdout -> exit status, the bytes that the terminal got."""
    import pty                                              # not on Windows
    ours, theirs = pty.openpty()
    process, shown, end = start(arguments, streams=(os.ttyname(theirs), os.devnull)), b'', time.monotonic() + timeout
    while process.is_alive() or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            shown += os.read(ours, 65536)
        if time.monotonic() > end:
            process.kill()
            raise TimeoutError(f'{arguments[0]} takes more than {timeout} s')
    os.close(ours), os.close(theirs)
    return process.exitcode, shown


def run(*arguments, cwd=REPOSITORY, timeout=200, **environment):
    """Like subprocess.run([sys.executable, *arguments], capture_output=True, text=True), with more in its environment."""
    if not hasattr(os, 'fork'):
        return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, encoding='utf-8',
                              env={**os.environ, **environment})
    with tempfile.TemporaryDirectory() as folder:
        streams = [os.path.join(folder, name) for name in ('out', 'err')]
        process = start(arguments, cwd, streams, **environment)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f'{arguments[0]} takes more than {timeout} s')
        return subprocess.CompletedProcess(arguments, process.exitcode, *(Path(path).read_text('utf-8') for path in streams))
