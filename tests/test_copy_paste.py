"""The pieces that people copy work in an empty file: their source, the packages' imports, and nothing else."""

import inspect
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist

import data
import disback
import distributional
import edm_nets
import fid
import teacher_free
from test_load import CONFIG, fake_package, official_pickle  # noqa: F401

NETWORK = ['init_layer', 'make_filter', 'resample', 'Resample', 'ResampleConv2d', 'FusedDownConv2d', 'GroupNorm',
           'UNetBlock', 'Positional', 'Fourier', 'UNet', 'SongUNet', 'DhariwalUNet', 'drop_labels', 'EDMPrecond']
HEADS = ['same_pad', 'MBConv', 'EfficientNetLite0', 'Projection', 'SumOverRanks', 'GlobalBatchNorm', 'SpectralConv',
         'projected_head', 'ProjectedHeads']


def lift(module, *names):
    """The namespace of an empty file into which `names` were copied from `module`, with its imports of packages."""
    text = inspect.getsource(module)
    lines = [line for line in text.split('\n') if re.match('import |from .* import ', line)]
    lines = [line for line in lines if not re.match(r'(import|from) (data|edm_nets|fid)\b', line)]
    for name in names:
        if isinstance(getattr(module, name), (float, int, dict)):
            lines.append(re.search(rf'^{name} = (\{{.*?\}}|.*?)( *#.*?)?$', text, re.M | re.S).group())
        else:
            lines.append(inspect.getsource(getattr(module, name)))
    namespace = {}
    exec('\n'.join(lines), namespace)  # our own source, run apart from the module it was copied from
    return namespace


@pytest.mark.parametrize('kwargs', [CONFIG, dict(
    img_resolution=16, img_channels=3, label_dim=4, model_type='DhariwalUNet', model_channels=32, channel_mult=[1, 2],
    num_blocks=1, attn_resolutions=[8])])
def test_the_network(kwargs):
    ours = edm_nets.EDMPrecond(**kwargs).eval()
    copy = lift(edm_nets, *NETWORK)['EDMPrecond'](**kwargs).eval()
    copy.load_state_dict(ours.state_dict())
    x, sigma, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 3.0]), torch.eye(4)[:2]
    assert torch.equal(copy(x, sigma, labels), ours(x, sigma, labels))


def test_the_reader_of_pickles(tmp_path):
    net = edm_nets.EDMPrecond(**CONFIG)
    (tmp_path / 'net.pkl').write_bytes(official_pickle(net, CONFIG))
    (tmp_path / 'evil.pkl').write_bytes(b'cos\nsystem\n(Vtrue\ntR.')
    read = lift(edm_nets, 'Recorded', 'RecordedDtype', 'OfficialUnpickler', 'read_official_pickle')[
        'read_official_pickle']
    kwargs, state = read(tmp_path / 'net.pkl')
    assert kwargs == CONFIG and all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match='os.system'):
        read(tmp_path / 'evil.pkl')


def test_the_projected_discriminator():
    copy = lift(distributional, *HEADS)
    own = dist.is_initialized()
    edm_nets.setup()  # its batch norm speaks to the other ranks
    logits = []
    for space in (vars(distributional), copy):
        torch.manual_seed(0)
        projection, heads = space['Projection'](space['EfficientNetLite0']()), space['ProjectedHeads'](torch.eye(3))
        images = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)
        with torch.no_grad():
            logits.append(heads(projection(images), torch.tensor([0, 2])))
    if not own:
        dist.destroy_process_group()
    assert torch.equal(*logits) and logits[0].shape == (2, 64)


def test_the_distance_and_the_order_of_batches():
    a, b = (torch.randn(30, 5).T.cov() for _ in range(2))
    copy = lift(fid, 'frechet_distance')['frechet_distance']
    assert copy(torch.zeros(5), a, torch.ones(5), b) == fid.frechet_distance(torch.zeros(5), a, torch.ones(5), b)
    for mine, ours in zip(lift(data, 'epoch_order', 'batch_order')['batch_order'](3, 90, 30, 100),
                          data.batch_order(3, 90, 30, 100)):
        assert np.array_equal(mine, ours)


def test_the_losses():
    """Those of every method, on the same random numbers."""
    x, y, z = (torch.randn(4, 3, 8, 8, requires_grad=True) for _ in range(3))
    sigma, l, m = torch.rand(4, 1, 1, 1) + 0.1, torch.randn(4), torch.randn(4)
    cases = [
        (edm_nets, [], 'denoising_loss', (lambda x_t, sigma, labels: x_t * 0.9, x, sigma, y)),
        (disback, ['sigma_data'], 'denoising_error', (x, y, sigma)),
        *((disback, [], 'student_loss', (x, y, z, form)) for form in ('di', 'dmd')),
        (teacher_free, [], 'ratio_loss', (l, m)),
        *((teacher_free, ['LOGIT_CLAMP', 'WEIGHTS', 'DIVERGENCES'], 'student_loss', (l, sigma, divergence, 'sigma'))
          for divergence in teacher_free.DIVERGENCES),
        (distributional, [], 'generator_loss', ([x.mean([1, 2, 3])],)),
        (distributional, [], 'discriminator_loss', ([x.mean([1, 2, 3])], [y.mean([1, 2, 3])])),
        (distributional, [], 'r1_penalty', ([x.square().sum([1, 2, 3])], x))]
    for module, needs, name, arguments in cases:
        assert torch.equal(lift(module, *needs, name)[name](*arguments), getattr(module, name)(*arguments)), name
