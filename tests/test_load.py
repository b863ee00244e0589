"""Official pickles are read without running anything in them; hostile and damaged ones are refused in one line."""

import collections
import io
import pickle
import sys
import types

import numpy as np
import pytest
import torch

import edm_nets

CONFIG = dict(img_resolution=16, img_channels=3, label_dim=4, use_fp16=False, model_type='SongUNet', augment_dim=9,
              model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8], dropout=0.13,
              embedding_type='fourier', encoder_type='residual', decoder_type='standard', channel_mult_noise=2,
              resample_filter=[1, 3, 3, 1])


def _reconstruct_persistent_obj(meta):
    raise AssertionError('the reader called the pickled function')


class Persistent:
    """Pickles as objects of EDM's torch_utils.persistence do."""

    def __init__(self, class_name, **state):
        self.meta = dict(type='class', version=6, module_src='raise SystemExit("executed")', class_name=class_name,
                         state=state)

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


@pytest.fixture(autouse=True)
def fake_package(monkeypatch):
    """Lets pickle write the global name torch_utils.persistence._reconstruct_persistent_obj."""
    module = types.ModuleType('torch_utils.persistence')
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setattr(_reconstruct_persistent_obj, '__module__', 'torch_utils.persistence')
    monkeypatch.setitem(sys.modules, 'torch_utils', types.ModuleType('torch_utils'))
    monkeypatch.setitem(sys.modules, 'torch_utils.persistence', module)


def record(module, **more):
    """An nn.Module as EDM's snapshots hold it; ModuleDict stays an ordinary torch object."""
    modules = collections.OrderedDict((k, m and record(m)) for k, m in module._modules.items())
    if isinstance(module, torch.nn.ModuleDict):
        container = torch.nn.ModuleDict()
        container._modules = modules
        return container
    return Persistent(
        type(module).__name__, training=False, _parameters=module._parameters, _buffers=module._buffers,
        _modules=modules, _non_persistent_buffers_set=set(), skip_scale=np.sqrt(0.5), **more)


def official_pickle(net, kwargs, protocol=4, **more):
    snapshot = dict(ema=record(net, _init_args=(), _init_kwargs=kwargs), augment_pipe=None,
                    loss_fn=Persistent('EDMLoss', P_mean=-1.2, P_std=1.2), dataset_kwargs=dict(path='x.zip'), **more)
    return pickle.dumps(snapshot, protocol=protocol)


@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_official_pickle(tmp_path, protocol):
    torch.manual_seed(0)
    net = edm_nets.EDMPrecond(**CONFIG)
    (tmp_path / 'net.pkl').write_bytes(official_pickle(net, CONFIG, protocol))
    loaded = edm_nets.load(tmp_path / 'net.pkl')
    assert list(loaded.state_dict()) == list(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x, labels = torch.randn(2, 3, 16, 16), torch.eye(4)[:2]
    assert torch.equal(loaded(x, 1.0, labels), net.eval()(x, 1.0, labels))


def test_own_file(tmp_path):
    net = edm_nets.EDMPrecond(**CONFIG)
    net.sigma_init = 2.5
    edm_nets.save(tmp_path / 'student.pt', net, 'shapes', 1234)
    content = torch.load(tmp_path / 'student.pt', weights_only=True)
    assert {'net', 'net_kwargs', 'sigma_init', 'dataset', 'kimg'} <= set(content) and content['kimg'] == 1.234
    loaded = edm_nets.load(tmp_path / 'student.pt')
    assert loaded.sigma_init == 2.5
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))


class Call:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def raw_global(module, name, argument):
    """A pickle that calls module.name(argument), whatever it is."""
    return f'c{module}\n{name}\n(V{argument}\ntR.'.encode()


def own_file(**changes):
    """This project's file with other arguments, or other entries."""
    net = edm_nets.EDMPrecond(**CONFIG)
    content = {key: changes.pop(key, value) for key, value in dict(net=net.state_dict(), sigma_init=2.5).items()}
    content['net_kwargs'] = dict(net.kwargs, **changes)
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def hostile(canary):
    import os
    net = edm_nets.EDMPrecond(**CONFIG)
    touch, python = f'touch {canary}', f'open({str(canary)!r}, "w")'
    good, torch_file = official_pickle(net, CONFIG), io.BytesIO()
    torch.save(Call(os.system, touch), torch_file, _use_new_zipfile_serialization=False)
    zip_file = io.BytesIO()
    torch.save(dict(net=Call(os.system, touch)), zip_file)
    gadget = Call(torch.storage._load_from_bytes, torch_file.getvalue())
    tensor = torch.zeros(4)
    rebuild = torch._utils._rebuild_tensor_v2
    storage = tensor.__reduce_ex__(2)[1][0]
    too_big = Call(rebuild, storage, 0, (1 << 40,), (0,), False, collections.OrderedDict())
    return {
        'os.system': pickle.dumps(dict(ema=Call(os.system, touch))),
        'posix.system': raw_global('posix', 'system', touch),
        'builtins.exec': pickle.dumps(Call(exec, python)),
        'builtins.eval': pickle.dumps(Call(eval, python)),
        'getattr': raw_global('builtins', 'getattr', 'x'),
        'numpy load': raw_global('numpy', 'load', str(canary)),
        'torch.load gadget': raw_global('torch', 'load', str(canary)),
        'torch.hub': raw_global('torch.hub', 'load', str(canary)),
        'inside the bytes of a storage': pickle.dumps(dict(ema=gadget)),
        'beside a good network': official_pickle(net, CONFIG, evil=Call(os.system, touch)),
        'inside a module': official_pickle(net, CONFIG, loss=Persistent('X', state=Call(os.system, touch))),
        'as class name': pickle.dumps(dict(ema=Persistent('os.system', _init_kwargs={}))),
        'unknown class': pickle.dumps(dict(ema=Persistent('VPPrecond', _init_kwargs=CONFIG, _init_args=()))),
        'unknown argument': official_pickle(net, dict(CONFIG, backdoor=1)),
        'other shapes': official_pickle(net, dict(CONFIG, model_channels=16)),
        'absurd depth': official_pickle(net, dict(CONFIG, num_blocks=10 ** 9)),
        'tensor bomb': pickle.dumps(dict(ema=too_big)),
        'memo bomb': b'\x80\x04Nr\xff\xff\xff\x7f.',
        'length bomb': b'\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0fx.',
        'nesting bomb': b'\x80\x04' + b']' * 100_000 + b'a' * 99_999 + b'.',
        'persistent id': b'\x80\x04Vx\nQ.',
        'truncated': good[:len(good) // 2],
        'cut at the end': good[:-1],
        'zip with a call': zip_file.getvalue(),
        'truncated zip': zip_file.getvalue()[:100],
        **{f'{key}={value}': own_file(**{key: value}) for key, value in [
            ('num_blocks', 10 ** 9), ('channel_mult', [1] * 99), ('channel_mult', [1, 2, 2, 2, 2, 2]),
            ('model_channels', 8.5), ('model_channels', -8), ('sigma_data', [0.5]), ('sigma_data', float('nan')),
            ('sigma_max', 'x'), ('dropout', 1e30), ('label_dim', None), ('resample_filter', [1, 2, 3]),
            ('sigma_init', 'x'), ('sigma_init', -1), ('sigma_init', 10 ** 30), ('net', {}), ('net', [1])]},
        **{f'weights {name}': own_file(net=dict(net.state_dict(), **{'model.map_layer0.bias': value}))
           for name, value in dict(nan=torch.full([32], np.nan), whole=torch.zeros(32, dtype=torch.int64),
                                   sparse=torch.ones(32).to_sparse(), complex=torch.zeros(32, dtype=torch.cfloat),
                                   shape=torch.zeros(33), text='x').items()},
        'weights missing': own_file(net=dict(list(net.state_dict().items())[1:])),
        'weights too many': own_file(net=dict(net.state_dict(), more=torch.zeros(1))),
        'safetensors': b'\x40\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(80),
        'random bytes': np.random.default_rng(0).bytes(5000),
        'empty': b''}


def test_hostile_files_are_refused(tmp_path):
    canary = tmp_path / 'canary'
    cases = hostile(canary)
    for name, content in cases.items():
        path = tmp_path / 'hostile.pkl'
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            edm_nets.load(path)
        assert '\n' not in str(error.value) and str(path) in str(error.value), name
        assert not canary.exists(), name
    assert len(cases) > 50
    pickle.loads(cases['os.system'])  # the canary does sing where pickle is trusted
    assert canary.exists()


def test_half_precision_is_read_as_float32(tmp_path):
    net = edm_nets.EDMPrecond(**CONFIG)
    (tmp_path / 'net.pt').write_bytes(own_file(net={k: v.half() for k, v in net.state_dict().items()}))
    assert all(x.dtype == torch.float32 for x in edm_nets.load(tmp_path / 'net.pt').state_dict().values())


def test_what_is_fetched_and_is_no_network_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv('ONE_STEP_CACHE', str(tmp_path / 'cache'))
    source = tmp_path / 'net.pkl'
    good = official_pickle(edm_nets.EDMPrecond(**CONFIG), CONFIG)
    for content in (b'<html>Please log in</html>', good[:-100]):
        source.write_bytes(content)
        with pytest.raises(ValueError, match='removed from the cache'):
            edm_nets.load(source.as_uri())
        assert not list((tmp_path / 'cache').iterdir()) and source.exists()
    source.write_bytes(good)
    edm_nets.load(source.as_uri())
    source.unlink()
    edm_nets.load(source.as_uri())  # from the cache
