"""Files appear whole or not at all, a run continues only as itself, errors end in one line."""

import argparse
import os

import pytest
import torch
import torch.distributed as dist

import data
import edm_nets

ARGS = dict(lr=0.1, decay=0.5, kimg=5)


@pytest.fixture(scope='module', autouse=True)
def process_group():
    """A process group of one, unless another test file has left one."""
    mine = not dist.is_initialized()
    edm_nets.setup()
    yield
    if mine:
        dist.destroy_process_group()


@pytest.fixture
def out(tmp_path):
    """A run folder with two checkpoints, of a network whose weights are all 1, then all 2."""
    (tmp_path / 'stats.jsonl').write_text('{"kimg": 1}\n')
    net = torch.nn.Linear(30, 30)
    for nimg in (1, 2):
        torch.nn.init.constant_(net.weight, nimg)
        data.save_checkpoint(tmp_path, dict(ARGS, images='0123abcd'), dict(nimg=nimg), dict(net=net))
    return tmp_path


def load(out, parts, **changed):
    """Resume the run with the images of `out`, or with something else changed."""
    fingerprint = changed.pop('images', '0123abcd')
    return data.load_checkpoint(argparse.Namespace(out=out, **dict(ARGS, **changed)), parts, images=fingerprint)


@pytest.mark.parametrize('error, message', [
    (OSError('disk full'), '^cannot write .*/x: disk full$'), (KeyError('bug'), 'bug'), (KeyboardInterrupt('^C'), 'C')])
def test_whole_file_leaves_nothing_behind_on_an_error(tmp_path, error, message):
    (tmp_path / 'x').write_bytes(b'old')
    with pytest.raises(type(error), match=message), data.whole_file(tmp_path / 'x') as f:
        f.write(b'new')
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ['x'] and (tmp_path / 'x').read_bytes() == b'old'


def test_checkpoint_comes_back_whole(out):
    net = torch.nn.Linear(30, 30)
    config, state = load(out, dict(net=net))
    assert config == dict(ARGS, images='0123abcd') and state['nimg'] == 2 and (net.weight == 2).all() and state['log_bytes'] == len('{"kimg": 1}\n')
    assert sorted(os.listdir(out)) == ['latest.pt', 'previous.pt', 'stats.jsonl']


@pytest.mark.parametrize('damage', [
    lambda x: b'', lambda x: x[:len(x) // 2], lambda x: x.replace(b'\0\0\0@' * 4, b'\0\0\1@' * 4, 1)])
def test_damaged_checkpoint_is_set_aside_and_the_previous_one_used(out, capsys, damage):
    content = damage((out / 'latest.pt').read_bytes())
    (out / 'latest.pt').write_bytes(content)
    assert data.newest_checkpoint(out) == f'{out}/previous.pt'
    assert 'latest.pt is damaged' in capsys.readouterr().out and (out / 'latest.pt.damaged').read_bytes() == content
    (out / 'previous.pt').write_bytes(b'')
    with pytest.raises(ValueError, match='no whole checkpoint is left'):
        data.newest_checkpoint(out)


@pytest.mark.parametrize('name, value', [('lr', 0.2), ('kimg', 6), ('images', '76543210')])
def test_another_setting_is_refused_by_name(out, name, value):
    net = torch.nn.Linear(30, 30)
    with pytest.raises(ValueError, match=f'another run .{name}: .* -> {value}.: give another --out'):
        load(out, dict(net=net), **{name: value})
    assert not (net.weight == 2).any()
    with pytest.raises(ValueError, match='no optimizer there'):  # the folder of another script
        load(out, dict(net=net, optimizer=None))


def test_weights_that_are_not_finite_are_never_saved(out):
    net = torch.nn.Linear(30, 30)
    torch.nn.init.constant_(net.bias, float('inf'))
    with pytest.raises(FloatingPointError, match='a weight of net is not finite'):
        data.save_checkpoint(out, ARGS, {}, dict(net=net))
    assert load(out, {})[1]['nimg'] == 2


@pytest.mark.parametrize('decay, kept', [(0.0, {'lr', 'decay'}), (0.5, {'lr', 'decay', 'kimg'})])
def test_settings_leave_out_what_may_change(tmp_path, decay, kept):
    args = argparse.Namespace(**dict(dict.fromkeys(data.MAY_CHANGE, 1), out=tmp_path), lr=0.1, kimg=5, decay=decay, k=1)
    config, state = data.load_checkpoint(args, {}, {'k'}, images='0123abcd')
    assert set(config) == {'images', *kept} and state == {}


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
