"""Official pickles are read without running anything in them; hostile and damaged ones are refused in one line."""

import collections
import io
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch

import edm_nets
from test_nets import VE

CONFIG = dict(VE, img_resolution=16, img_channels=3, label_dim=4, use_fp16=False, model_channels=8, channel_mult=[1, 2],
              num_blocks=1, attn_resolutions=[8], dropout=0.13, decoder_type='standard')


class Call:
    """It pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def _reconstruct_persistent_obj(meta):
    raise AssertionError('the reader called the pickled function')


# Pickle writes the name torch_utils.persistence._reconstruct_persistent_obj only if there is such a module.
_reconstruct_persistent_obj.__module__ = 'torch_utils.persistence'
sys.modules['torch_utils'] = sys.modules['torch_utils.persistence'] = types.SimpleNamespace(
    _reconstruct_persistent_obj=_reconstruct_persistent_obj)


def persistent(class_name, **state):
    """What pickles as objects of EDM's torch_utils.persistence do."""
    return Call(_reconstruct_persistent_obj, dict(
        type='class', version=6, module_src='raise SystemExit("executed")', class_name=class_name, state=state))


def record(module, **more):
    """An nn.Module as EDM's snapshots hold it, in which a ModuleDict is an ordinary torch object."""
    modules = collections.OrderedDict((k, m and record(m)) for k, m in module._modules.items())
    if isinstance(module, torch.nn.ModuleDict):
        container = torch.nn.ModuleDict()
        container._modules = modules
        return container
    return persistent(type(module).__name__, _parameters=module._parameters, _buffers=module._buffers,
                      _modules=modules, training=False, skip_scale=np.sqrt(0.5), **more)


def official_pickle(net, kwargs=CONFIG, protocol=4, **more):
    return pickle.dumps(dict(ema=record(net, _init_args=(), _init_kwargs=kwargs), augment_pipe=None,
                             loss_fn=persistent('EDMLoss', P_mean=-1.2), **more), protocol=protocol)


def own_file(**changes):
    """This project's file with other arguments, or other entries."""
    net, out = edm_nets.EDMPrecond(**CONFIG), io.BytesIO()
    content = {key: changes.pop(key, value) for key, value in dict(net=net.state_dict(), sigma_init=2.5).items()}
    torch.save(content | dict(net_kwargs=dict(net.kwargs, **changes)), out)
    return out.getvalue()


@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_official_pickle_is_read_to_the_bit(tmp_path, protocol):
    net = edm_nets.EDMPrecond(**CONFIG)
    (tmp_path / 'net.pkl').write_bytes(official_pickle(net, protocol=protocol))
    loaded = edm_nets.load(tmp_path / 'net.pkl')
    torch.testing.assert_close(loaded.state_dict(), net.state_dict(), rtol=0, atol=0)
    assert loaded.sigma_init is None and not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_own_file_comes_back_to_the_bit_in_float32(tmp_path, dtype):
    net = edm_nets.EDMPrecond(**CONFIG).to(dtype)
    net.sigma_init = 2.5
    edm_nets.save(tmp_path / 'net.pt', net, 'shapes', 1234)
    content, loaded = torch.load(tmp_path / 'net.pt', weights_only=True), edm_nets.load(tmp_path / 'net.pt')
    assert set(content) == {'net', 'net_kwargs', 'sigma_init', 'dataset', 'kimg'} and content['kimg'] == 1.234
    torch.testing.assert_close(loaded.state_dict(), net.float().state_dict(), rtol=0, atol=0)
    assert loaded.sigma_init == 2.5


def hostile(canary):
    net, touch = edm_nets.EDMPrecond(**CONFIG), Call(os.system, f'touch {canary}')
    state, good, out = net.state_dict(), official_pickle(net), io.BytesIO()
    torch.save(touch, out, _use_new_zipfile_serialization=False)
    too_big = torch.zeros(4).__reduce_ex__(2)[1][0], 0, (1 << 40,), (0,), False, collections.OrderedDict()
    return {
        'call': pickle.dumps(dict(ema=touch)), 'beside a good network': official_pickle(net, evil=touch),
        'inside a storage': pickle.dumps(dict(ema=Call(torch.storage._load_from_bytes, out.getvalue()))),
        **{name: 'c{}\n{}\n(Vtouch {}\ntR.'.format(*name.split(), canary).encode() for name in (
            'posix system', 'builtins exec', 'builtins getattr', 'numpy load', 'torch load', 'torch.hub load')},
        'unknown class': pickle.dumps(dict(ema=persistent('os.system', _init_kwargs=CONFIG, _init_args=()))),
        **{f'official {key}': official_pickle(net, dict(CONFIG, **{key: value})) for key, value in dict(
            backdoor=1, model_channels=16, num_blocks=10 ** 9).items()},
        'tensor bomb': pickle.dumps(dict(ema=Call(torch._utils._rebuild_tensor_v2, *too_big))),
        'memo bomb': b'\x80\x04Nr\xff\xff\xff\x7f.', 'length bomb': b'\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0fx.',
        'nesting bomb': b'\x80\x04' + b']' * 100_000 + b'a' * 99_999 + b'.', 'persistent id': b'\x80\x04Vx\nQ.',
        'half': good[:len(good) // 2], 'cut': good[:-1], 'cut zip': own_file()[:100], 'empty': b'', 'text': b'hello',
        **{f'{key}={str(value)[:9]}': own_file(**{key: value}) for key, value in [
            ('num_blocks', 10 ** 9), ('channel_mult', [1] * 99), ('channel_mult', [1, 2, 2, 2, 2, 2]), ('net', {}),
            ('model_channels', 8.5), ('model_channels', -8), ('sigma_data', [0.5]), ('sigma_data', float('nan')),
            ('sigma_max', 'x'), ('label_dim', None), ('resample_filter', [1, 2, 3]), ('sigma_init', 'x'),
            ('sigma_init', -1), ('sigma_init', 10 ** 30), ('net', [1]), ('net', dict(list(state.items())[1:])),
            ('net', dict(state, more=torch.zeros(1))), ('net', dict(state, evil=touch))]},
        **{f'weights {name}': own_file(net=dict(state, **{'model.map_layer0.bias': value})) for name, value in dict(
            nan=torch.full([32], np.nan), whole=torch.zeros(32, dtype=torch.int64), shape=torch.zeros(33), text='x',
            sparse=torch.ones(32).to_sparse(), complex=torch.zeros(32, dtype=torch.cfloat)).items()}}


def test_hostile_files_are_refused_in_one_line_and_run_nothing(tmp_path):
    path, canary = tmp_path / 'hostile.pkl', tmp_path / 'canary'
    for name, content in (cases := hostile(canary)).items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f'^cannot load {path}: .*$'):
            edm_nets.load(path)
        assert not canary.exists(), name
    pickle.loads(cases['call'])  # the canary does sing where pickle is trusted
    assert canary.exists()


def test_what_is_fetched_and_is_no_network_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv('ONE_STEP_CACHE', str(tmp_path / 'cache'))
    source, good = tmp_path / 'net.pkl', official_pickle(edm_nets.EDMPrecond(**CONFIG))
    for content in (b'<html>Please log in</html>', good[:-100]):
        source.write_bytes(content)
        with pytest.raises(ValueError, match='removed from the cache'):
            edm_nets.load(source.as_uri())
    source.write_bytes(good)
    edm_nets.load(source.as_uri())
    source.unlink()
    edm_nets.load(source.as_uri())  # from the cache


def test_teacher_is_opened_without_augmentation_and_must_fit_the_data(tmp_path):
    net, path = edm_nets.EDMPrecond(**CONFIG), tmp_path / 'net.pkl'
    path.write_bytes(official_pickle(net))
    teacher = edm_nets.open_teacher(path, types.SimpleNamespace(resolution=16, label_dim=4))
    expected = {k: v for k, v in net.state_dict().items() if 'map_augment' not in k}
    torch.testing.assert_close(dict(teacher.state_dict()), expected, rtol=0, atol=0)
    for same in (True, False):
        teacher.model.map_layer0.bias[0] = teacher.model.map_layer0.bias[0] if same else 7
        edm_nets.save(tmp_path / 'net.pt', teacher, 'shapes', 0)
        assert (edm_nets.open_teacher(tmp_path / 'net.pt').fingerprint == teacher.fingerprint) == same
    for resolution, label_dim in [(32, 4), (16, 5), (16, 0)]:
        with pytest.raises(ValueError, match=f'^{path} is a network of 16 px and 4 classes, the data has .*$'):
            edm_nets.open_teacher(path, types.SimpleNamespace(resolution=resolution, label_dim=label_dim))
