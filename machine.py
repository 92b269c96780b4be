"""The machine under train.py, sample.py and bench.py: device, description, memory; and a file that is written whole.

Imports torch, so it is imported after configure() has answered --help and typos.
"""
import os
import platform
import subprocess
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import torch

from configurator import fail, say

# Dense bfloat16 matrix rate in FLOP/s (vendors' data sheets), for mfu, by the whole name that the driver gives: an H100
# NVL or a MIG slice is no H100 SXM. Elsewhere, and in float32, mfu is null
PEAK_FLOPS = {'NVIDIA H200': 989e12, 'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA A100-SXM4-40GB': 312e12,
              'NVIDIA A100-SXM4-80GB': 312e12, 'NVIDIA A100-PCIE-40GB': 312e12, 'NVIDIA A100 80GB PCIe': 312e12,
              'NVIDIA L40S': 362e12, 'NVIDIA L4': 121e12, 'NVIDIA GeForce RTX 4090': 165e12}


def choose_device(name, kinds=('cuda', 'mps', 'cpu'), index=None):
    """--device -> torch.device, that of this process from now on; auto: the first of `kinds` that is here.

    index: of the GPU that this process is to take, whatever the name says (several processes, one GPU each).
    """
    there = {'cuda': torch.cuda.device_count(), 'mps': int(torch.backends.mps.is_available()), 'cpu': 1}
    try:
        device = torch.device(next(kind for kind in kinds if there[kind]) if name == 'auto' else name)
    except RuntimeError:
        fail(f'--device={name} is no device; try auto, {", ".join(reversed(kinds))} or cuda:1')
    if device.type == 'cuda' and index is not None:
        device = torch.device('cuda', index)
    count = there[device.type] if device.type in kinds else 0
    if (device.index or 0) >= count:
        fail(f'--device={name}: there is no {device} for this program, torch {torch.__version__} sees {count}; '
             'try --device=auto')
    if device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)            # memory, names and events are those of the current one
    return device


def choose_dtype(name, device, n_embd):
    """--dtype -> 'float32' or 'bfloat16'; auto: bfloat16 where the processor computes in it, for a model wide enough.

    A GPU says itself whether it computes in bfloat16 or emulates it; CPUs compute in it with AMX or AVX512-BF16. In a narrow
    model casts and small products cost what they save: an update of 4 x 512 tokens in bfloat16 is 1.2, 1.3, 1.5, 1.6 and 1.5
    times as fast as in float32 at widths of 96, 128, 192, 256 and 320 on a Xeon with AMX (results/bench/width-*.md). An EPYC
    with AVX512-BF16 alone was half as fast at 96, with the code before kernels.py, and 1.4 times as fast at 384.
    """
    if name != 'auto':
        return name
    if device.type == 'cuda':
        computes = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        amx = torch.cpu._is_amx_tile_supported()
        computes = device.type == 'cpu' and (amx or torch.cpu._is_avx512_bf16_supported()) and n_embd >= (128 if amx else 256)
    return 'bfloat16' if computes else 'float32'


def choose_compile(wanted, device, file=None):
    """--compile -> bool; None: on GPUs. False, with a line to `file`, where it lacks its C++ compiler or, on a GPU, triton."""
    wanted = device.type == 'cuda' if wanted is None else wanted
    try:
        if wanted:
            torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
        return wanted
    except Exception as error:
        reason = f'{type(error).__name__}: {str(error).strip()}'.splitlines()[0]
        say(f'torch.compile does not work here ({reason}); going on without', file)
        return False


# ---------------------------------------------------------------------------------------------------------------------
# What it is, what is used of it

def device_name(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:                                                    # Linux tells a CPU's model here and nowhere else
        with open('/proc/cpuinfo') as file:
            return next(line.split(':')[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git(*command):
    """What git says about this folder; None without git or a repository."""
    command = ['git', '-C', Path(__file__).resolve().parent, *command]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def environment(device):
    """Where and with what something was run, for a result file. $GIT_COMMIT names the commit of a copy without .git."""
    ours = git('ls-files', '--error-unmatch', Path(__file__).name)      # not a repository that this one is only copied into
    changes = ours and git('status', '--porcelain', '--untracked-files=no')
    return {'device_name': device_name(device), 'threads': torch.get_num_threads(), 'torch': str(torch.__version__),
            'python': platform.python_version(), 'platform': platform.platform(),
            'git_commit': ours and git('rev-parse', 'HEAD') or os.environ.get('GIT_COMMIT'),
            'git_dirty': None if changes is None else bool(changes)}


def peak_memory_gb(device):
    """Largest amount so far, in 10^9 bytes: of device memory on a CUDA GPU, else of this process's resident memory."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:                                                    # getrusage's peak includes the process that started this
        with open('/proc/self/status') as file:
            return next(int(line.split()[1]) for line in file if line.startswith('VmHWM')) * 1024 / 1e9
    except (OSError, StopIteration):
        with suppress(ImportError):                         # on Windows Python cannot tell
            import resource
            unit = 1 if platform.system() == 'Darwin' else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def out_of_memory(error):
    """Whether it is what torch raises where memory ends: of a CUDA GPU, of a Mac, of the processor."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or isinstance(error, RuntimeError) and (
        'out of memory' in str(error) or "can't allocate memory" in str(error))


def now():
    return datetime.now().astimezone().isoformat(timespec='seconds')


def write_atomically(path, write):
    """write(file) aside, flushed to the disk, renamed over `path`: there is always one whole file under that name."""
    aside = path.with_name(path.name + '.tmp')
    try:
        with open(aside, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:                # torch.save ends in one of its own that hides the OSError
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        aside.unlink(missing_ok=True)
        fail(f'{path} could not be written ({getattr(cause, "strerror", None) or cause}); what was there before is still '
             'there')
