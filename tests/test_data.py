"""Data sets, downloads from a local server, run folders: each format and fault; nothing that only looks finished."""

import argparse
import hashlib
import io
import json
import re
import socketserver
import tarfile
import threading
import time
import zipfile
from multiprocessing.pool import ThreadPool
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

import data


def pictures(n, side=8):
    return np.random.default_rng(0).integers(0, 256, [n, side, side, 3], dtype=np.uint8)


def saved(save, *args, **kwargs):
    save(out := io.BytesIO(), *args, **kwargs)
    return out.getvalue()


def png(image):
    return saved(Image.fromarray(image).save, format='png')


def zipped(members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(out := io.BytesIO(), 'w', compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def edm_zip(labels, compression=zipfile.ZIP_STORED, **more):
    """pictures(4) as EDM packs them, with more members."""
    members = {f'00000/img{i}.png': png(image) for i, image in enumerate(pictures(4))}
    index = dict(labels=labels and list(zip(members, labels)))
    return zipped({**members, 'dataset.json': json.dumps(index), **more}, compression)


def tarball(labels=(3, 0, 9, 1, 2), mode='w:gz'):  # pictures(5, 32) as CIFAR-10 comes, one image in each batch
    with tarfile.open(fileobj=(out := io.BytesIO()), mode=mode) as tar:
        for i, label in enumerate(labels):
            info = tarfile.TarInfo(f'cifar/data_batch_{i + 1}.bin')
            info.size = 3073
            tar.addfile(info, io.BytesIO(bytes([label]) + pictures(5, 32)[i].transpose(2, 0, 1).tobytes()))
    return out.getvalue()


def prepare(folder, source, *flags):  # the source is the bytes of a file, or {name: bytes} of a folder
    for name, content in (source if isinstance(source, dict) else {'': source}).items():
        (folder / 'source' / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / 'source' / name).write_bytes(content)
    return run(ROOT / 'data.py', 'prepare', folder / 'source', folder / 'dest', *flags)


MAP = '\n'.join(f'n{99 - i if i < 10 else 0:02} {i + 1} name_{i}' for i in range(11)).encode()  # nearly in reverse
PICTURE, ROWS, ONES = png(pictures(1)[0]), pictures(11).transpose(0, 3, 1, 2).reshape(11, -1), np.ones(11, np.int64)


@pytest.mark.parametrize('source, images, labels', [
    (edm_zip([2, 0, 1, 0]), pictures(4), [2, 0, 1, 0]), (tarball(), pictures(5, 32), [3, 0, 9, 1, 2]),
    (edm_zip(None, **dict.fromkeys(['../../x.png', '/x.png', 'C:\\x.png'], PICTURE)), pictures(4)[[0, *range(4), 0]],
     [0] * 6),
    ({**{f'train_data_batch_{i}.npz': saved(np.savez, data=ROWS[i:i + 1], labels=[i + 1]) for i in range(11)},
      'val_data.npz': b'not for training', 'map_clsloc.txt': MAP}, pictures(11), [*range(10, 0, -1), 0])],
    ids=['EDM', 'CIFAR', 'names that lead elsewhere', 'downsampled ImageNet'])
def test_source_is_prepared_and_nothing_else_written(tmp_path, source, images, labels):
    before = set(tmp_path.parent.rglob('*.*'))
    prepare(tmp_path, source)
    written = {path.name for path in set(tmp_path.parent.rglob('*.*')) - before}
    assert written <= {'images.npy', 'labels.npy', 'classes.json', *source}
    dataset, every = data.Folder(tmp_path / 'dest'), np.arange(len(images))
    assert np.array_equal(dataset.images(every), images.transpose(0, 3, 1, 2)) and len(dataset) == len(images)
    assert dataset.labels(every).tolist() == labels and dataset.label_dim == (max(labels) + 1 if any(labels) else 0)


def test_image_folder_with_classes_crop_modes_transparency_and_a_turned_image(tmp_path):
    wide = Image.fromarray(pictures(1, 40)[0][:30])  # 40 wide, 30 high
    glass, turned = Image.new('RGBA', wide.size, (255, 0, 0, 0)), wide.getexif()
    turned[0x0112] = 6
    done = prepare(tmp_path, {
        'n02/a.png': saved(wide.save, 'png'), 'n01/b.png': saved(wide.convert('L').save, 'png'),
        'n01/c.jpg': saved(wide.convert('CMYK').save, 'jpeg', exif=turned), 'n02/d.png': saved(glass.save, 'png')},
        '--resolution', '16')
    dataset, expected = data.Folder(tmp_path / 'dest'), wide.crop((5, 0, 35, 30)).resize((16, 16), Image.LANCZOS)
    assert np.array_equal(dataset.images([2])[0].permute(1, 2, 0), np.asarray(expected))
    assert dataset.images([3]).unique().tolist() == [255]  # not the red under it
    assert dataset.labels(np.arange(4)).tolist() == [0, 0, 1, 1]
    for note in ('from L: 1; ', 'EXIF says to turn them (as EDM does): 1; ', 'from CMYK: 1; ', 'put on white: 1\n'):
        assert note in done.stdout


INDEX, GREY = json.dumps(dict(labels=[['a/0.png', 1], ['b/1.png', 0]])).encode(), png(np.zeros([8, 8], np.uint8))
LAYOUTS = {  # what is on the disk, the labels, what is said
    'in two folders': ({'x/y/a/0.png': GREY, 'x/y/b/1.png': GREY, 'x/y/dataset.json': INDEX}, [1, 0], '0 (1), 1 (1)'),
    'zip': (zipped({'x/a/0.png': GREY, 'x/b/1.png': GREY, 'x/dataset.json': INDEX, '__MACOSX/._x': b''}), [1, 0],
            'hidden files passed over: 1'),
    'hidden': ({'cat/1.png': GREY, 'cat/._1.png': b'', '.trash/2.png': GREY, '@eaDir/3.png': b'', 'dog/4.png': GREY,
                'Thumbs.db': b''}, [0, 1], 'hidden files passed over: 3; other files passed over (.db): 1'),
    'empty class': ({'n00/1.png': GREY, 'n01/.x': b'', 'n02/2.png': GREY, 'n03/.x': b''}, [0, 2],
                    'class 1 = n01, 3 = n03'),
    'numbers': ({f'{i}/1.png': GREY for i in range(11)}, [0, 1, 10, *range(2, 10)], ' 9 = 9 (1), 10 = 10 (1)'),
    'parts': ({f'{part}/{name}/1.png': GREY for part in ('train', 'val') for name in 'ab'}, [0, 0, 1, 1],
              '2 classes: 0 = train (2), 1 = val (2)'),
    'many': ({f'c{i:02}/1.png': GREY for i in range(20)}, list(range(20)), '4 = c04 (1), ..., 17 = c17 (1), 18'),
    'no classes': ({'x/1.png': GREY, 'x/2.jfif': saved(Image.new('RGB', [8, 8]).save, 'jpeg')}, [0, 0], 'no labels')}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layout_is_understood_and_told(tmp_path, layout):
    source, labels, message = LAYOUTS[layout]
    done, dataset = prepare(tmp_path, source), data.Folder(tmp_path / 'dest')
    assert message in done.stdout and dataset.labels(np.arange(len(dataset))).tolist() == labels
    assert dataset.label_dim == {'no classes': 0, 'empty class': 4}.get(layout, max(labels) + 1)


def test_two_that_prepare_the_same_do_not_mix(tmp_path, monkeypatch):
    (tmp_path / 'source').write_bytes(edm_zip(None))
    decode, others = data.decode, [16]

    def meanwhile(*args):  # at the first image of 8 px another process makes one of 16 px, from beginning to end
        if others:
            monkeypatch.setattr('os.getpid', lambda: 1)
            data.prepare(tmp_path / 'source', tmp_path / 'dest', others.pop())
        return decode(*args)
    monkeypatch.setattr(data, 'decode', meanwhile)
    with pytest.raises(FileExistsError, match='another process made it'):
        data.prepare(tmp_path / 'source', tmp_path / 'dest')
    assert data.Folder(tmp_path / 'dest').images(np.arange(4)).shape == (4, 3, 16, 16)
    assert {path.name for path in tmp_path.iterdir()} == {'source', 'dest'}


FAULTY = {
    'absent': {}, 'empty': {'no picture': b''}, 'text': b'hello', 'cut zip': edm_zip(None)[:300],
    'oblong': {'a.png': png(pictures(1)[0][:5])}, '16 bits': {'a.png': png(np.zeros([8, 8], np.uint16))},
    **{f'image {content[:4]}': edm_zip(None, **{'x.png': content}) for content in (png(pictures(1, 9)[0]), b'no PNG')},
    **{f'label {label}': edm_zip([0, label, 1, 2]) for label in (-1, None, True, 0.5, 1 << 40)},
    'labels: some': edm_zip([0, 1, 2, 3], **{'x.png': PICTURE}),
    'labels: rows': {'train_data.npz': saved(np.savez, data=ROWS)},
    'labels: folders': {'a/1.png': PICTURE, 'b/1.png': PICTURE, '2.png': PICTURE},
    'labels: nested': {'x/dataset.json': b'?', 'x/1.png': PICTURE, 'y/1.png': PICTURE},
    **{f'json {text[:12]}': edm_zip(None, **{'dataset.json': text})
       for text in ('[1]', '[' * 100_000, '{"labels": 3}', '{"labels": [["a"')},
    **{f'damaged zip {method}': (x := edm_zip(None, method))[:60] + bytes(30) + x[90:]  # each method has its own errors
       for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED)},
    'damaged xz': (x := tarball(mode='w:xz'))[:40] + bytes(20) + x[60:], 'cut tarball': tarball()[:3000],
    'class 77': tarball([0, 1, 77, 2, 3]), 'no data_batch_5': tarball(range(4)),
    **{f'npz {name}': {'train_data.npz': saved(np.savez, data=rows, labels=labels), 'map_clsloc.txt': MAP}
       for name, (rows, labels) in dict(
           floats=(ROWS / 255, ONES), short=(ROWS, ONES[:3]), long=(ROWS, [1] * 12), oblong=(ROWS[:, :100], ONES),
           half=(ROWS, ONES / 2), zero=(ROWS, 0 * ONES), one=(ROWS, 1), objects=(ROWS, ONES.astype(object))).items()}}


@pytest.mark.parametrize('fault', FAULTY)
def test_faulty_source_is_refused_in_one_line(tmp_path, fault):
    done = prepare(tmp_path, FAULTY[fault])
    assert done.returncode == 1 and re.fullmatch(r'data\.py: cannot prepare .+\n', done.stderr), done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {'source'}
    if fault.startswith('labels'):  # then they need not be used
        assert '--no-labels' in done.stderr and prepare(tmp_path, FAULTY[fault], '--no-labels').returncode == 0
        assert data.Folder(tmp_path / 'dest').label_dim == 0


@pytest.mark.parametrize('fault', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_full_disk_and_interruption_leave_nothing(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(data, 'decode', mock.Mock(side_effect=[pictures(1)[0], fault]))
    (tmp_path / 'source').write_bytes(edm_zip(None))
    with pytest.raises((ValueError, KeyboardInterrupt)):
        data.prepare(tmp_path / 'source', tmp_path / 'dest')
    assert [path.name for path in tmp_path.iterdir()] == ['source']


@pytest.mark.parametrize('images, labels', [
    (ROWS, ONES), (pictures(11) / 255, ONES), (pictures(11)[:, :5], ONES), (pictures(11)[..., :2], ONES),
    (pictures(0), ONES[:0]), (pictures(11), ONES[:3]), (pictures(11), -ONES), (pictures(11), ONES / 2),
    (pictures(11), ONES << 60), (pictures(11), ONES.astype(object)), (None, ONES)])
def test_damaged_folder_is_refused_in_one_line(tmp_path, images, labels):
    content = saved(np.save, pictures(11))[:-1] if images is None else saved(np.save, images)
    (tmp_path / 'images.npy').write_bytes(content)
    np.save(tmp_path / 'labels.npy', labels)
    with pytest.raises(ValueError, match=f'^.*{tmp_path}.*$'):
        data.open_dataset('cifar10', tmp_path)


def test_batch_order_depends_on_seed_and_place_alone_and_an_epoch_shows_each_image_once():
    indices, flips = whole = data.batch_order(3, 0, 250, 100)
    for size in (1, 7, 50):
        parts = zip(*(data.batch_order(3, n, min(size, 250 - n), 100) for n in range(0, 250, size)))
        assert all(np.array_equal(np.concatenate(part), every) for part, every in zip(parts, whole))
    assert sorted(indices[:100]) == sorted(indices[100:200]) == list(range(100))
    assert not np.array_equal(indices[:100], indices[100:200]) and 0.3 < flips.mean() < 0.7
    assert not np.array_equal(data.batch_order(4, 0, 250, 100)[0], indices)


def test_a_dataset_is_recognised_by_images_all_over_it():
    dataset = data.Shapes(1000)
    before, dataset.colour[495:505] = data.identity(dataset), (dataset.colour[495:505] + 1) % 6
    assert data.identity(dataset) != before


def test_linked_folders_are_followed(tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / '1.png').write_bytes(PICTURE)
    (tmp_path / 'source').mkdir()
    for name in 'ab':
        (tmp_path / 'source' / name).symlink_to(tmp_path / 'elsewhere')
    assert '2 classes: 0 = a (1), 1 = b (1)' in prepare(tmp_path, {}).stdout


def test_random_numbers_of_a_step_depend_on_each_argument():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    assert len({torch.rand(1, generator=data.step_generator(*key, 'cpu')).item() for key in keys * 2}) == 5


def test_pixels_survive_the_round_trip_and_flips_mirror():
    levels, images = torch.arange(256, dtype=torch.uint8), data.Shapes(2).images(np.arange(2))
    assert torch.equal(data.to_uint8(x := data.to_float(levels)), levels) and x[::255].tolist() == [-1, 1]
    assert data.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
    x = data.load_images(data.Shapes(2), np.arange(2), torch.device('cpu'), np.array([False, True]))
    assert torch.equal(data.to_uint8(x), torch.stack([images[0], images[1].flip(2)])) and (x[1] != x[1].flip(2)).any()


@pytest.fixture
def server():
    """It gives the next of its answers, whatever is asked."""
    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            server.asked.append(b''.join(iter(self.rfile.readline, b'\r\n')))
            self.wfile.write(server.answers.pop(0))
            time.sleep(server.pause)

    with socketserver.ThreadingTCPServer(('127.0.0.1', 0), Handler) as server:
        server.asked, server.pause, server.url = [], 0, f'http://127.0.0.1:{server.server_address[1]}/file.bin'
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        yield server
        server.shutdown()


CONTENT, HALF = np.random.default_rng(0).bytes(3_000_000), 1_500_000
WHOLE = b'HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n'
CHUNKED = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2dc6c0\r\n'
REST = b'HTTP/1.1 206 OK\r\nContent-Range: bytes 1500000-2999999/3000000\r\nContent-Length: 1500000\r\n\r\n'
MOVED = b'HTTP/1.1 302 Moved\r\nLocation: /moved\r\n\r\n'


@pytest.mark.parametrize('answer, message, kept', [
    (WHOLE + CONTENT[:HALF], '1500000 of 3000000 bytes', HALF), (WHOLE + CONTENT[:HALF], 'timed out', HALF),
    (CHUNKED + CONTENT[:HALF], 'Incomplete', HALF), (b'HTTP/1.1 404 Absent\r\n\r\n', '404: Absent; check', HALF),
    (MOVED, 'redirect', HALF), (b'220 ESMTP\r\n', 'cannot fetch', HALF), (WHOLE + bytes(3_000_000), 'other bytes', 0),
    (REST.replace(b'1500000-', b'1499993-'), 'go on', 0), (b'HTTP/1.1 416 Beyond\r\n\r\n', 'go on', 0)],
    ids=lambda x: x if isinstance(x, str) else '')
def test_failed_download_says_why_in_one_line_and_keeps_what_is_good(tmp_path, server, answer, message, kept):
    server.answers, server.pause, partial = [answer] * 12, 0.5 * (message == 'timed out'), tmp_path / 'f.partial'
    partial.write_bytes(CONTENT[:HALF])
    with pytest.raises(OSError, match=f'^.*{message}.*$'):
        data.download(server.url, tmp_path / 'f', timeout=0.2, md5=hashlib.md5(CONTENT).hexdigest())
    content = partial.read_bytes() if partial.exists() else b''
    assert not (tmp_path / 'f').exists() and CONTENT.startswith(content) and len(content) >> 20 == kept >> 20


@pytest.mark.parametrize('answers', [[REST + CONTENT[HALF:]], [WHOLE + CONTENT], [MOVED, REST + CONTENT[HALF:]]],
                         ids=['the rest', 'all of it', 'redirected'])
def test_download_goes_on_where_it_stopped(tmp_path, server, answers):
    (tmp_path / 'f.partial').write_bytes(CONTENT[:HALF])
    server.answers = answers
    data.download(server.url, tmp_path / 'f', md5=hashlib.md5(CONTENT).hexdigest()[:8])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {'f': CONTENT, 'f.lock': b''}
    assert all(b'Range: bytes=1500000-\r\n' in request for request in server.asked)


def test_of_two_that_fetch_the_same_one_waits(tmp_path, server):
    server.answers = [WHOLE + CONTENT]
    with ThreadPool(2) as pool:
        paths = pool.map(lambda _: data.download(server.url, tmp_path / 'f'), range(2))
    assert paths == [tmp_path / 'f'] * 2 and paths[0].read_bytes() == CONTENT and len(server.asked) == 1


def test_where_downloads_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', '/x')
    monkeypatch.delenv('ONE_STEP_CACHE', raising=False)
    path = data.cache_path('https://a.b/c/net.pkl?signature=' + 'x' * 300 + '/y')
    assert str(path.parent) == '/x/.cache/one-step-diffusion' and path.name[8:] == '-net.pkl'
    monkeypatch.delenv('HOME')
    assert data.cache_path('https://a.b/net').parent.is_absolute()
    with pytest.raises(OSError, match='^cannot keep .* writable; for .*ONE_STEP_CACHE can name another folder$'):
        data.download('https://a.b/net', f'{__file__}/net')  # no folder
    with pytest.raises(OSError, match='^cannot fetch s3://a/b: .*unknown url type.*; check the address$'):
        data.download('s3://a/b', tmp_path / 'net')


def test_cifar10_is_fetched_and_what_is_no_prepared_folder_says_how_to_make_one(tmp_path, server, monkeypatch):
    server.answers = [b'HTTP/1.1 200 OK\r\n\r\n' + (archive := tarball())]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, 'CIFAR10_URL', server.url)
    monkeypatch.setattr(data, 'CIFAR10_MD5', hashlib.md5(archive).hexdigest())
    assert data.open_dataset('cifar10').labels(np.arange(5)).tolist() == [3, 0, 9, 1, 2]
    (tmp_path / 'x.zip').write_bytes(b'')
    for dataset, path, names in (('imagenet64', None, '.* datasets/imagenet64 --resolution 64'),
                                 ('cifar10', tmp_path / 'x.zip', f'{tmp_path}/x.zip {tmp_path}/x'),
                                 ('ffhq64', tmp_path, f'{tmp_path} {tmp_path}-prepared')):
        with pytest.raises(FileNotFoundError, match=f'`python data.py prepare {names}`'):
            data.open_dataset(dataset, path)


@pytest.mark.parametrize('error, message', [
    (OSError('disk full'), '^cannot write .*/x: disk full$'), (KeyError('bug'), 'bug'), (KeyboardInterrupt('^C'), 'C')])
def test_whole_file_leaves_nothing_behind_on_an_error(tmp_path, error, message):
    (tmp_path / 'x').write_bytes(b'old')
    with pytest.raises(type(error), match=message), data.whole_file(tmp_path / 'x') as f:
        f.write(b'new')
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ['x'] and (tmp_path / 'x').read_bytes() == b'old'


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(tmp_path, world):
    args = argparse.Namespace(out=str(tmp_path), kimg=1)
    data.start_log(args, {}, 'the plan')
    with pytest.raises(BlockingIOError, match=f'^another process uses {tmp_path}/stats.jsonl: wait .*torchrun.$'):
        data.lock(tmp_path / 'stats.jsonl')
    data.start_log(args, {}, 'the plan')  # the next run of the same process
    data.LOCKED.clear()  # as at the end of the process
    data.lock(tmp_path / 'stats.jsonl').close()


def test_a_run_is_complete_only_where_it_wrote_a_network(tmp_path, capsys):
    args, state = argparse.Namespace(out=str(tmp_path), kimg=7000), dict(nimg=7_100_416)
    with pytest.raises(ValueError, match='has reached 7100.42 kimg, and no network was written there: give a --kimg'):
        data.start_log(args, state, 'the plan')
    (tmp_path / 'student-007100.pt').touch()
    data.start_log(args, state, 'the plan')
    assert 'is complete at 7100.42 kimg' in capsys.readouterr().out


def test_status_lines_count_exactly_to_the_end_of_long_runs(tmp_path, capsys):
    data.log_status(tmp_path, dict(kimg=123456.789, sec_per_kimg=1.23456789), 200_000_000)
    assert ' 62%  kimg 123456.789  sec_per_kimg 1.2346  ' in capsys.readouterr().out


def test_grey_images_are_drawn(tmp_path):
    data.save_panels({'': torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)}, tmp_path / 'x.png', 1, 1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'x.png')), np.arange(16).reshape(4, 4, 1).repeat(3, 2))


def test_means_average_and_name_the_first_scalar_that_is_not_finite(world):
    means = data.Means(1000)
    for loss in (1.0, 3.0):
        means.add(loss=torch.tensor(loss))
    stats = means.collect(2000)
    assert stats['loss'] == 2 and stats['sec_per_kimg'] == pytest.approx(stats['seconds'])
    for student, fake_score in torch.tensor([[1, 1], [1, np.inf], [np.nan, 1]]):
        means.add(student=student, fake_score=fake_score)
    with pytest.raises(FloatingPointError, match='^fake_score is not finite'):
        means.collect(2000)


@pytest.mark.parametrize('error, start', [
    (ValueError('wrong flag'), 'x.py: wrong flag'), (FileNotFoundError('no file'), 'x.py: no file'),
    (torch.OutOfMemoryError('full.'), 'x.py: full. A smaller --batch-gpu'), (KeyError('bug'), 'Traceback')])
def test_what_can_be_mended_ends_in_one_line_and_the_rest_in_a_traceback(capsys, error, start):
    with pytest.raises(SystemExit, match='^1$'), data.clear_errors('x.py'):
        raise error
    message = capsys.readouterr().err
    assert message.startswith(start) and str(error) in message and (start == 'Traceback' or message.count('\n') == 1)


def test_more_processes_than_gpus_are_told(monkeypatch, capsys):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 4)
    for name in ('RANK', 'LOCAL_RANK'):
        monkeypatch.setenv(name, '4')
    with pytest.raises(SystemExit, match='^1$'), data.clear_errors('x.py'):
        pytest.fail('the script ran')
    assert capsys.readouterr().err == 'x.py: --nproc_per_node must not be above the 4 GPUs of this machine\n'
