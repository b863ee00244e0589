"""The tests need neither network nor GPU."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

os.environ['ONEDNN_MAX_CPU_ISA'] = 'AVX512_CORE_FP16'  # some virtual machines advertise AMX and trap it
os.environ['CUDA_VISIBLE_DEVICES'] = ''
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['PYTHONPATH'] = str(ROOT)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402

torch.set_num_threads(1)  # as in the processes that are started

ENV = dict(os.environ, OMP_NUM_THREADS='1')
TEACHER = ['--kimg', '1', '--batch', '32', '--channels', '8', '--channel-mult', '1', '2', '--status-kimg', '0.25',
           '--snapshot-kimg', '0.25']


def run(*command, processes=1, path=None):
    """A command as a user types it: a script of the project with its arguments, or python's own arguments.

    Scripts run inside this process, which saves the import of torch; several processes, and whatever is not a script,
    run apart. `path` is added to the Python path.
    """
    command = [str(part) for part in command]
    if processes == 1 and Path(command[0]).parent == ROOT:
        module, output, errors, code = importlib.import_module(Path(command[0]).stem), io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                module.main(command[1:])
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
                print(stop.code if isinstance(stop.code, str) else '', file=sys.stderr)
        return subprocess.CompletedProcess(command, code, output.getvalue(), errors.getvalue())
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []
    env = dict(ENV, PYTHONPATH=f'{path or ""}{os.pathsep}{ROOT}')
    return subprocess.run([sys.executable, *launcher, *command], env=env, capture_output=True, text=True, timeout=200)


def weights(path):
    return torch.load(path, weights_only=True)['net']


def distance(a, b):
    """Relative distance of two sets of weights."""
    return float(sum((a[k] - b[k]).square().sum() for k in a).sqrt() / sum(a[k].square().sum() for k in a).sqrt())


@pytest.fixture(scope='session')
def runs(tmp_path_factory):
    """A folder with a tiny teacher on shapes, teacher/teacher-000001.pt."""
    folder = tmp_path_factory.mktemp('runs')
    done = run(ROOT / 'edm_nets.py', 'train', '--dataset', 'shapes', *TEACHER, '--out', folder / 'teacher')
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same random numbers, whichever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def few_shapes(monkeypatch):
    """`shapes` of 2,000 images instead of 50,000, for scripts inside this process: a reference of scores in no time."""
    monkeypatch.setattr(data.Shapes.__init__, '__defaults__', (2_000, 0))


@pytest.fixture(scope='session')
def unlabelled(tmp_path_factory):
    """The flags for a run on a folder of images without labels, and its unconditional teacher."""
    folder = tmp_path_factory.mktemp('unlabelled')
    np.save(folder / 'images.npy', np.random.default_rng(0).integers(0, 256, [64, 16, 16, 3], dtype=np.uint8))
    flags = ['--dataset', 'cifar10', '--data', folder, '--batch', '32', '--kimg', '0.064']
    done = run(ROOT / 'edm_nets.py', 'train', *flags, '--channels', '8', '--channel-mult', '1', '2', '--blocks', '1',
               '--attention', '8', '--rampup-kimg', '0.1', '--out', folder / 'teacher')
    assert done.returncode == 0, done.stderr
    return [*flags, '--teacher', folder / 'teacher' / 'teacher-000000.pt']
