"""Files appear whole or not at all, a run continues only as itself, errors end in one line."""

import argparse

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import data
import edm_nets


@pytest.fixture(scope='module', autouse=True)
def process_group():
    """A process group of one, unless another test file has left one."""
    mine = not dist.is_initialized()
    edm_nets.setup()
    yield
    if mine:
        dist.destroy_process_group()


@pytest.mark.parametrize('error, message', [
    (OSError('disk full'), '^cannot write .*/x: disk full$'), (KeyError('bug'), 'bug'), (KeyboardInterrupt('^C'), 'C')])
def test_whole_file_leaves_nothing_behind_on_an_error(tmp_path, error, message):
    (tmp_path / 'x').write_bytes(b'old')
    with pytest.raises(type(error), match=message), data.whole_file(tmp_path / 'x') as f:
        f.write(b'new')
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ['x'] and (tmp_path / 'x').read_bytes() == b'old'


@pytest.mark.parametrize('decay, kept', [(0.0, {'lr', 'decay'}), (0.5, {'lr', 'decay', 'kimg'})])
def test_settings_leave_out_what_may_change(tmp_path, decay, kept):
    args = argparse.Namespace(**dict(dict.fromkeys(data.MAY_CHANGE, 1), out=tmp_path), lr=0.1, kimg=5, decay=decay, k=1)
    config, state = data.load_checkpoint(args, {}, {'k'}, images='0123abcd')
    assert set(config) == {'images', *kept} and state == {}


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(tmp_path):
    args = argparse.Namespace(out=str(tmp_path), kimg=1)
    data.start_log(args, {}, 'the plan')
    with pytest.raises(BlockingIOError, match=f'^{tmp_path}/stats.jsonl is in use by another run .*torchrun.$'):
        data.lock(tmp_path / 'stats.jsonl')
    data.start_log(args, {}, 'the plan')  # the next run of the same process
    data.LOCKED.clear()  # as at the end of the process
    data.lock(tmp_path / 'stats.jsonl').close()


def test_a_launcher_that_is_not_torchrun_is_told_so(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.delenv('LOCAL_RANK')
    with pytest.raises(SystemExit), data.clear_errors('x.py'):
        edm_nets.setup()
    assert capsys.readouterr().err == 'x.py: RANK is set and LOCAL_RANK is not: start several processes with torchrun\n'


def test_grey_images_are_drawn(tmp_path):
    data.save_panels({'': torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)}, tmp_path / 'x.png', 1, 1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'x.png')), np.arange(16).reshape(4, 4, 1).repeat(3, 2))


def test_means_average():
    means = data.Means(1000)
    for loss in (1.0, 3.0):
        means.add(loss=torch.tensor(loss))
    stats = means.collect(2000)
    assert stats['loss'] == 2 and stats['sec_per_kimg'] == pytest.approx(stats['seconds'])


def test_means_name_the_first_scalar_that_is_not_finite():
    means = data.Means(0)
    for values in ((1, 1), (1, float('inf')), (float('nan'), 1)):
        means.add(student=torch.tensor(float(values[0])), fake_score=torch.tensor(float(values[1])))
    with pytest.raises(FloatingPointError, match='^fake_score is not finite'):
        means.collect(1)


@pytest.mark.parametrize('error, start', [
    (ValueError('wrong flag'), 'x.py: wrong flag'), (FileNotFoundError('no file'), 'x.py: no file'),
    (torch.OutOfMemoryError('full.'), 'x.py: full. A smaller --batch-gpu'), (KeyError('bug'), 'Traceback')])
def test_what_can_be_mended_ends_in_one_line_and_the_rest_in_a_traceback(capsys, error, start):
    with pytest.raises(SystemExit, match='^1$'), data.clear_errors('x.py'):
        raise error
    message = capsys.readouterr().err
    assert message.startswith(start) and str(error) in message and (start == 'Traceback' or message.count('\n') == 1)
