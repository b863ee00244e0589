"""Every source format, every fault: one line, and nothing that looks finished. Downloads from a local server."""

import hashlib
import http.server
import io
import json
import pickle
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data


def png(array, mode=None, **kwargs):
    out = io.BytesIO()
    Image.fromarray(array, mode).save(out, format='png', **kwargs)
    return out.getvalue()


def pictures(n, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, [n, side, side, 3], dtype=np.uint8)


def write_zip(path, images, labels):
    names = [f'00000/img{i:08d}.png' for i in range(len(images))]
    with zipfile.ZipFile(path, 'w') as z:
        for name, image in zip(names, images):
            z.writestr(name, png(image))
        z.writestr('dataset.json', json.dumps(dict(labels=labels and [[n, l] for n, l in zip(names, labels)])))


def assert_prepared(path, images, labels):
    dataset = data.Folder(path)
    assert np.array_equal(dataset.images(np.arange(len(dataset))), images.transpose(0, 3, 1, 2))
    assert (labels is None) == (dataset.label_dim == 0)
    if labels is not None:
        assert dataset.labels(np.arange(len(dataset))).tolist() == list(labels)


@pytest.mark.parametrize('labels', [[2, 0, 1, 0, 2], None])
def test_edm_zip(tmp_path, labels):
    images = pictures(5)
    write_zip(tmp_path / 'x.zip', images, labels)
    data.main(['prepare', str(tmp_path / 'x.zip'), str(tmp_path / 'x')])
    assert_prepared(tmp_path / 'x', images, labels)


def test_folder_with_classes_crop_and_modes(tmp_path, capsys):
    """ILSVRC style: sorted sub-folders are classes; centre crop, then Lanczos; grey, palette and CMYK become RGB."""
    wide = pictures(1, 40)[0][:30]  # 30 high, 40 wide
    for wnid in ('n02', 'n01'):
        (tmp_path / 'src' / wnid).mkdir(parents=True)
    Image.fromarray(wide).save(tmp_path / 'src' / 'n02' / 'a.png')
    Image.fromarray(wide[:, :, 0]).save(tmp_path / 'src' / 'n01' / 'b.png')
    Image.fromarray(wide).convert('CMYK').save(tmp_path / 'src' / 'n01' / 'c.jpg')
    Image.fromarray(wide).convert('RGBA').save(tmp_path / 'src' / 'n02' / 'd.png')
    data.main(['prepare', str(tmp_path / 'src'), str(tmp_path / 'x'), '--resolution', '16'])
    dataset = data.Folder(tmp_path / 'x')
    assert dataset.labels(np.arange(4)).tolist() == [0, 0, 1, 1] and dataset.resolution == 16
    expected = np.asarray(Image.fromarray(wide[:, 5:35]).resize((16, 16), Image.Resampling.LANCZOS))
    assert np.array_equal(dataset.images([2])[0].permute(1, 2, 0), expected)
    assert '1 from L' in capsys.readouterr().out


def cifar_tar(path, kind, bad_label=None):
    rng = np.random.default_rng(0)
    rows, labels = rng.integers(0, 256, [50, 3072], dtype=np.uint8), rng.integers(0, 10, 50)
    labels[0] = labels[0] if bad_label is None else bad_label
    with tarfile.open(path, 'w:gz') as tar:
        for i in range(5):
            part, y = rows[i * 10:(i + 1) * 10], labels[i * 10:(i + 1) * 10]
            content = np.concatenate([y[:, None].astype(np.uint8), part], 1).tobytes() if kind == 'binary' \
                else pickle.dumps(dict(data=part, labels=y.tolist()), protocol=2)
            info = tarfile.TarInfo(f'cifar/data_batch_{i + 1}' + ('.bin' if kind == 'binary' else ''))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.tolist()


@pytest.mark.parametrize('kind', ['binary', 'python'])
def test_cifar_tarballs(tmp_path, kind):
    images, labels = cifar_tar(tmp_path / 'c.tar.gz', kind)
    data.main(['prepare', str(tmp_path / 'c.tar.gz'), str(tmp_path / 'x')])
    assert_prepared(tmp_path / 'x', images, labels)


def test_downsampled_imagenet_npz(tmp_path):
    images = pictures(6)
    for i in (1, 2):
        part = images[(i - 1) * 3:i * 3].transpose(0, 3, 1, 2).reshape(3, -1)
        np.savez(tmp_path / f'train_data_batch_{i}.npz', data=part, labels=np.array([1, 2, 3]))
    data.main(['prepare', str(tmp_path), str(tmp_path / 'x')])
    assert_prepared(tmp_path / 'x', images, [0, 1, 2, 0, 1, 2])


def faulty(tmp_path):
    """name -> a source that must be refused."""
    images = pictures(4)
    for name in ('truncated.zip', 'badlabel.zip', 'missing-label.zip', 'mixed.zip', 'unreadable.zip'):
        write_zip(tmp_path / name, images, [0, 1, 2, -1 if name == 'badlabel.zip' else 3])
    content = (tmp_path / 'truncated.zip').read_bytes()
    (tmp_path / 'truncated.zip').write_bytes(content[:len(content) // 2])
    for name, extra in (('mixed.zip', png(pictures(1, 9)[0])), ('unreadable.zip', b'\x89PNG not really')):
        with zipfile.ZipFile(tmp_path / name, 'a') as z:
            z.writestr('00000/img00000009.png', extra)
        with zipfile.ZipFile(tmp_path / name) as z:
            members = {n: z.read(n) for n in z.namelist()}
        members['dataset.json'] = b'{"labels": null}'
        with zipfile.ZipFile(tmp_path / name, 'w') as z:
            for n, c in members.items():
                z.writestr(n, c)
    with zipfile.ZipFile(tmp_path / 'missing-label.zip', 'a') as z:
        z.writestr('00000/img00000009.png', png(images[0]))
    cifar_tar(tmp_path / 'label.tar.gz', 'binary', bad_label=77)
    (tmp_path / 'cut.tar.gz').write_bytes((tmp_path / 'label.tar.gz').read_bytes()[:3000])
    with tarfile.open(tmp_path / 'hostile.tar.gz', 'w:gz') as tar:
        info = tarfile.TarInfo('data_batch_1')
        evil = b'cos\nsystem\n(Vtouch ' + str(tmp_path / 'canary').encode() + b'\ntR.'
        info.size = len(evil)
        tar.addfile(info, io.BytesIO(evil))
    for name, label in dict(none=None, true=True, float=0.5, huge=1 << 40).items():
        write_zip(tmp_path / f'{name}-labels.zip', images, [0, label, 1, 2])
    for name, content in dict(list='[1]', deep='[' * 100_000, number='{"labels": 3}', text='{"labels": [["a"').items():
        with zipfile.ZipFile(tmp_path / f'{name}-json.zip', 'w') as z:
            z.writestr('a.png', png(images[0]))
            z.writestr('dataset.json', content)
    for compression in ('LZMA', 'BZIP2', 'DEFLATED'):  # a damaged stream: each library has an exception of its own
        with zipfile.ZipFile(tmp_path / f'{compression}.zip', 'w', getattr(zipfile, f'ZIP_{compression}')) as z:
            z.writestr('a.png', png(images[0]))
        content = bytearray((tmp_path / f'{compression}.zip').read_bytes())
        content[60:90] = bytes(30)
        (tmp_path / f'{compression}.zip').write_bytes(content)
    with tarfile.open(tmp_path / 'xz.tar', 'w:xz') as tar:
        tar.addfile(tarfile.TarInfo('data_batch_1.bin'))
    content = bytearray((tmp_path / 'xz.tar').read_bytes())
    content[40:60] = bytes(20)
    (tmp_path / 'xz.tar').write_bytes(content)
    flat, ones = images.transpose(0, 3, 1, 2).reshape(4, -1), np.ones(4, np.int64)
    for name, (pixels, labels) in dict(
            floats=(flat / 255, ones), short=(flat, ones[:3]), long=(flat, np.ones(5, np.int64)),
            oblong=(flat[:, :100], ones), half=(flat, ones / 2), zero=(flat, 0 * ones), one=(flat, ones[0]),
            objects=(flat, ones.astype(object))).items():
        (tmp_path / f'npz-{name}').mkdir()
        np.savez(tmp_path / f'npz-{name}' / 'train_data_batch_1.npz', data=pixels, labels=labels)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'oblong').mkdir()
    Image.fromarray(pictures(1, 8)[0][:5]).save(tmp_path / 'oblong' / 'a.png')
    (tmp_path / 'deep').mkdir()
    Image.fromarray(np.zeros([8, 8], np.uint16)).save(tmp_path / 'deep' / 'a.png')
    (tmp_path / 'text').write_text('hello')
    return ['truncated.zip', 'badlabel.zip', 'missing-label.zip', 'mixed.zip', 'unreadable.zip', 'label.tar.gz',
            'cut.tar.gz', 'hostile.tar.gz', 'empty', 'oblong', 'deep', 'text', 'nowhere', 'xz.tar', 'LZMA.zip',
            'BZIP2.zip', 'DEFLATED.zip',
            *(path.name for path in tmp_path.glob('*-*') if path.name != 'missing-label.zip')]


def test_faulty_sources_leave_nothing(tmp_path):
    cases = faulty(tmp_path)
    assert len(cases) == 33
    for name in cases:
        with pytest.raises(SystemExit) as stop:
            data.main(['prepare', str(tmp_path / name), str(tmp_path / 'dest')])
        assert isinstance(stop.value.code, str) and '\n' not in stop.value.code, name
        assert not (tmp_path / 'dest').exists() and not list(tmp_path.glob('.dest*')), name
    assert not (tmp_path / 'canary').exists()


def test_names_that_lead_elsewhere_are_only_names(tmp_path):
    images = pictures(3)
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as z:
        for name, image in zip(('../../evil.png', '/evil.png', 'C:\\evil.png'), images):
            z.writestr(name, png(image))
    before = set(tmp_path.parent.rglob('*'))
    data.main(['prepare', str(tmp_path / 'x.zip'), str(tmp_path / 'dest')])
    assert len(data.Folder(tmp_path / 'dest')) == 3
    assert {path.name for path in set(tmp_path.parent.rglob('*')) - before} == {'dest', 'images.npy'}


def test_prepared_folders_are_checked(tmp_path, capsys):
    """A damaged folder is refused in one line; one with little in it gets a warning."""
    def write(pixels, labels):
        np.save(tmp_path / 'images.npy', pixels)
        np.save(tmp_path / 'labels.npy', labels)
    images, labels = pictures(6), np.array([0, 1, 2, 0, 1, 2])
    for pixels, y in [(images / 255, labels), (images[:, :5], labels), (images[..., :2], labels),
                      (images[:0], labels[:0]), (images, labels[:3]), (images, labels - 1), (images, labels / 2),
                      (images, labels + (1 << 60)), (images, labels.astype(object))]:
        write(pixels, y)
        with pytest.raises(ValueError, match=str(tmp_path)) as error:
            data.open_dataset('cifar10', tmp_path)
        assert '\n' not in str(error.value)
    write(images, labels)
    content = (tmp_path / 'images.npy').read_bytes()
    (tmp_path / 'images.npy').write_bytes(content[:-1])
    with pytest.raises(ValueError, match='images.npy is damaged'):
        data.open_dataset('cifar10', tmp_path)
    for pixels, y, warning in [(images, labels, ''), (images[:1], labels[:1], 'one image alone'),
                               (images, labels * 2, 'no image of 2 of 5 classes, e.g. of class 1'),
                               (images * 0, labels, 'the first images are all the same')]:
        write(pixels, y)
        capsys.readouterr()
        data.open_dataset('cifar10', tmp_path)
        assert warning in capsys.readouterr().out or not warning


def test_full_disk_and_interruption_leave_nothing(tmp_path, monkeypatch):
    write_zip(tmp_path / 'x.zip', pictures(5), None)
    for fault in (OSError(28, 'No space left on device'), KeyboardInterrupt()):
        calls = []

        def failing(*args, **kwargs):
            calls.append(1)
            if len(calls) == 4:
                raise fault
            return decode(*args, **kwargs)
        decode = data.decode
        monkeypatch.setattr(data, 'decode', failing)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            data.main(['prepare', str(tmp_path / 'x.zip'), str(tmp_path / 'dest')])
        monkeypatch.setattr(data, 'decode', decode)
        assert len(calls) == 4 and not (tmp_path / 'dest').exists() and not list(tmp_path.glob('.dest*'))


def test_what_cannot_be_fetched_says_how_to_prepare_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='data.py prepare .* datasets/imagenet64 --resolution 64'):
        data.open_dataset('imagenet64')


def test_batch_order_is_a_pure_function():
    """Any way of cutting the run gives the same images; an epoch shows each image once."""
    indices, flips = data.batch_order(3, 0, 250, 100)
    for size in (1, 7, 50):
        parts = [data.batch_order(3, n, min(size, 250 - n), 100) for n in range(0, 250, size)]
        assert np.array_equal(np.concatenate([p[0] for p in parts]), indices)
        assert np.array_equal(np.concatenate([p[1] for p in parts]), flips)
    assert sorted(indices[:100]) == sorted(indices[100:200]) == list(range(100))
    assert not np.array_equal(indices[:100], indices[100:200]) and 0.3 < flips.mean() < 0.7
    assert not np.array_equal(data.batch_order(4, 0, 250, 100)[0], indices)


def test_step_generator_depends_on_each_argument():
    draws = {torch.rand(1, generator=data.step_generator(*key, 'cpu')).item()
             for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]}
    assert len(draws) == 5
    assert torch.equal(torch.rand(3, generator=data.step_generator(1, 2, 3, 'cpu')),
                       torch.rand(3, generator=data.step_generator(1, 2, 3, 'cpu')))


def test_pixels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(levels)), levels)
    assert data.to_float(levels).min() == -1 and data.to_float(levels).max() == 1
    assert data.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, well or in one of the ways in which downloads go wrong."""
    content, mode, ranges = b'', 'whole', []

    def do_GET(self):
        mode = 'whole' if self.path == '/moved' else self.mode
        if mode in ('redirect', 'loop', '404', '503', 'range refused'):
            status = dict(redirect=302, loop=302, **{'range refused': 416}).get(mode) or int(mode)
            self.send_response(status)
            self.send_header('Location', '/moved' if mode == 'redirect' else self.path)
            self.send_header('Content-Length', '0')
            return self.end_headers()
        if mode == 'no http':
            return self.wfile.write(b'220 mail.example ESMTP\r\n')
        start = 0
        if 'Range' in self.headers:
            self.ranges.append(self.headers['Range'])
            if mode != 'no range':
                start = int(self.headers['Range'][6:-1])
        self.send_response(206 if start else 200)
        if mode == 'cut chunk':
            self.send_header('Transfer-Encoding', 'chunked')
        else:
            self.send_header('Content-Length', str(len(self.content) - start))
        if start:
            first = start - 7 if mode == 'other range' else start
            self.send_header('Content-Range', f'bytes {first}-{len(self.content) - 1}/{len(self.content)}')
        self.end_headers()
        body = bytes(len(self.content)) if mode == 'other bytes' else self.content
        half = mode in ('cut', 'stall', 'cut chunk') and not start
        self.wfile.write((b'2dc6c0\r\n' if mode == 'cut chunk' else b'') + body[start:len(body) // 2 if half else None])
        if mode == 'stall':
            self.wfile.flush()
            time.sleep(0.6)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def server():
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    Server.content, Server.mode, Server.ranges = np.random.default_rng(0).bytes(3_000_000), 'whole', []
    yield f'http://127.0.0.1:{httpd.server_port}/file.bin'
    httpd.shutdown()


def test_download_resumes_and_verifies(tmp_path, server):
    """Whatever goes wrong is told in one line and leaves no file; the next try goes on, or begins anew."""
    md5, path, partial = hashlib.md5(Server.content).hexdigest(), tmp_path / 'f', tmp_path / 'f.partial'
    for mode, message, size in [
            ('cut', 'go on', 1_500_000), ('stall', 'timed out', 1_500_000), ('cut chunk', 'IncompleteRead', 1_500_000),
            ('other bytes', 'other bytes', None), ('404', 'HTTP Error 404', None), ('503', 'HTTP Error 503', None),
            ('loop', 'redirect', None), ('no http', 'cannot fetch', None)]:
        Server.mode = mode
        with pytest.raises(OSError, match=message) as error:
            data.download(server, path, timeout=0.3, md5=md5)
        assert '\n' not in str(error.value) and not path.exists(), mode
        assert size is None or size >> 20 == partial.stat().st_size >> 20, mode  # what came is kept
        for second in ('whole', 'no range', 'redirect', 'other range', 'range refused'):
            begun = partial.exists()
            kept = partial.read_bytes() if begun else b''
            Server.mode, Server.ranges[:] = second, []
            if second in ('other range', 'range refused'):
                if begun:
                    with pytest.raises(OSError, match='again'):
                        data.download(server, path, md5=md5)
                    assert not path.exists() and not partial.exists()  # so that the next try begins anew
            else:
                data.download(server, path, md5=md5)
                assert path.read_bytes() == Server.content and not partial.exists(), (mode, second)
                assert Server.ranges == ([f'bytes={len(kept)}-'] if begun else [])
                path.unlink()
            if begun:
                partial.write_bytes(kept)
        partial.unlink(missing_ok=True)


def test_cifar10_is_fetched_and_prepared(tmp_path, server, monkeypatch):
    images, labels = cifar_tar(tmp_path / 'c.tar.gz', 'binary')
    Server.content = (tmp_path / 'c.tar.gz').read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, 'CIFAR10_URL', server)
    monkeypatch.setattr(data, 'CIFAR10_MD5', hashlib.md5(Server.content).hexdigest())
    data.open_dataset('cifar10')
    assert_prepared(tmp_path / 'datasets' / 'cifar10', images, labels)
