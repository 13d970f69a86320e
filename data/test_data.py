"""
Text comes back from its tokens, a dataset is whole or refused, and each epoch reads all of it.

    python -m pytest -q data
"""
import itertools
import json
import lzma
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train
from data import corpus
from data.corpus import (folder_of, prepare, read_dataset, read_files, split_files, window_starts,
                         write)
from data.tokenizer import EOT, PATTERN, encoding, make_tokenizer, tokenizer_dict, train_bpe

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / 'quant.py').read_text(encoding='utf-8')
each = pytest.mark.parametrize


def test_bpe_and_bytes_give_the_text_back(tmp_path):
    text = TEXT + 'äöü €\r\n\t  <|endoftext|>'
    for vocab in (256, 400):
        tokenizer = make_tokenizer(vocab, text)
        enc = encoding(tokenizer)
        ids = enc.encode_ordinary(text)
        assert max(ids) < tokenizer['vocab_size'] == enc.n_vocab == vocab
        assert enc.decode(ids) == text and json.loads(json.dumps(tokenizer)) == tokenizer
    ranks = train_bpe(text, 400)
    assert ranks[:256] == [bytes([b]) for b in range(256)] and max(map(len, ranks)) <= 16
    assert ranks == train_bpe(text, 400) and len(set(ranks)) == 400
    pairs = [a + b for word in ('aab', 'aab', 'aac') for a, b in zip(word, word[1:])]
    assert train_bpe('aab aab aac', 257)[256].decode() == max(sorted(set(pairs)), key=pairs.count)
    # each word counts as often as it is there, and of a tie the smallest bytes win
    assert train_bpe('xyz\nxyz\nxyz\nxz\nxz', 259)[256:] == [b'xy', b'xyz', b'xz']
    assert train_bpe('ba\nba\nab\nab', 257)[256] == b'ab'
    meta = prepare(tmp_path, 'x', [('train', 'ab ' * 9), ('val', 'cd ' * 99)], 258)
    assert meta['ranks'][256:] == ['ab']                                # of train alone
    two = tokenizer_dict('bpe', PATTERN, ranks[:256], EOT, 'PAD')       # the first ends a document
    assert [*corpus.encode(two, [('val', 'a')])] == [('val', 'a', [97, 256])]


def test_what_is_not_text_and_what_is_no_vocabulary(tmp_path, capsys):
    for name, content in (('a.py', b'fine'), ('b.py', b'k\xf6stlich'), ('c.py', b'')):
        (tmp_path / name).write_bytes(content)
    assert read_files(tmp_path) == [('a.py', 'fine')]
    assert 'not UTF-8: 1, such as b.py' in capsys.readouterr().out
    for vocab in ('255', '2000000', 'abc'):
        with pytest.raises(SystemExit, match='256'):
            prepare(tmp_path, 'x', [('train', 'abc'), ('val', 'abc')], vocab)
    assert not (tmp_path / 'meta.json').exists()


def test_no_folder_is_left_out_without_a_word(tmp_path, capsys):
    (tmp_path / 'own').mkdir()
    (tmp_path / 'own' / 'a.py').write_text('fine')
    (tmp_path / 'linked').symlink_to(tmp_path / 'own')
    assert read_files(tmp_path) == [('own/a.py', 'fine')]
    assert 'as they are links: 1, such as' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='closed: '):       # root could read one without rights
        read_files(tmp_path / 'closed')


def test_files_are_taken_by_name_and_size(tmp_path):
    (tmp_path / 'e').mkdir()
    for name, text in (('a.py', 'x'), ('b.py', 'y' * 9), ('z.txt', 'z'), ('d.py', 'no'),
                       ('e/a.py', 'no')):
        (tmp_path / name).write_text(text)
    assert read_files(tmp_path, '*.py', ('d.*', 'e'), max_bytes=8) == [('a.py', 'x')]
    names = [name for name, _ in read_files(tmp_path)]
    assert names == ['a.py', 'b.py', 'd.py', 'e/a.py', 'z.txt']


def test_val_is_about_a_tenth_of_few_files_and_of_many():
    many = [(f'{i}.py', 'x' * 100) for i in range(1000)]
    for files in (many[:1], many[:3], [*many[:3], ('long', 'x' * 9999)], many):
        sizes = Counter()
        for split, text in split_files(files):
            sizes[split] += len(text)
        assert 0.08 < sizes['val'] / sizes.total() < 0.12, files[-1][0]
        assert sizes.total() == sum(len(text) for _, text in files)     # none is in both
    assert split_files(many)[:900] == split_files(many[:900])
    splits = [split for split, _ in split_files(many)]                      # on every machine
    assert [i for i, split in enumerate(splits) if split == 'val'][:4] == [4, 14, 51, 60]


@each('name', ['train.bin', 'val.bin', 'meta.json'])
def test_files_of_others_stay(name, tmp_path):
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(SystemExit, match=f'{name} is of no dataset that we know'):
        prepare(tmp_path, 'x', [('train', 'abc'), ('val', 'abc')], 256)
    assert [*tmp_path.iterdir()] == [tmp_path / name]


def test_gpt2s_tokens_have_its_ids(monkeypatch):
    ranks = {bytes([255 - i]): i for i in range(256)}
    monkeypatch.setattr('tiktoken_ext.openai_public.gpt2', lambda: {
        'pat_str': PATTERN, 'mergeable_ranks': ranks})
    assert encoding(make_tokenizer('gpt2')).encode_ordinary('a') == [255 - ord('a')]


def test_a_stream_that_breaks_is_a_line(tmp_path):
    def documents():
        yield 'train', 'abc'
        raise RuntimeError('the hub has gone')
    with pytest.raises(SystemExit, match='is not written: .*the hub has gone'):
        prepare(tmp_path, 'x', documents(), 256)
    assert not [*tmp_path.iterdir()]


def test_a_stream_ends_with_the_document_that_reaches_the_limit(tmp_path):
    def documents():
        yield 'val', 'abc' * 9
        for _ in range(99):
            yield 'train', 'abc' * 9
    meta = prepare(tmp_path, 'x', documents(), 256, 60)
    assert (meta['val_tokens'], meta['train_tokens']) == (27, 54)


def test_a_dataset_that_is_made_anew_is_whole_or_gone(tmp_path, monkeypatch):
    prepare(tmp_path, 'x', [('train', 'abc'), ('val', 'abc')], 256)
    monkeypatch.setattr(corpus.os, 'replace', lambda *_: exec('raise OSError'))
    with pytest.raises(SystemExit, match='is not written'):
        prepare(tmp_path, 'x', [('train', 'abd'), ('val', 'abd')], 256)
    assert not (tmp_path / 'meta.json').exists()


def test_a_corpus_without_a_download_is_built_when_it_is_missing(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(corpus, 'folder_of', lambda name: f'{tmp_path}/{name}')
    monkeypatch.setattr(corpus.subprocess, 'run', ran.append)
    for name in 'python', 'sympy', 'openwebtext':
        corpus.build(name)
    assert [args[1] for args in ran] == [f'{tmp_path}/{x}/prepare.py' for x in ('python', 'sympy')]


def test_yardsticks_are_the_entropy_of_unigrams_and_the_size_of_an_xz(tmp_path):
    val = ['abab' * 50, 'some text, and more of it ' * 20, 'aé€']
    meta = prepare(tmp_path, 'x', [('train', 'abc'), *(('val', text) for text in val)], 256)
    counts = Counter(''.join(val).encode())
    n = sum(counts.values())
    assert meta['val_bytes'] == n
    loss = -sum(k / n * math.log(k / n) for k in counts.values())
    assert meta['unigram_loss'] == pytest.approx(loss, 1e-12)
    assert meta['xz_bpb'] == 8 * len(lzma.compress(''.join(val).encode())) / n


def test_prepare_says_how_to_train_from_any_folder_on_any_console(tmp_path):
    (tmp_path / 'mine.txt').write_text('some text of mine, and more of it. ' * 99)
    done = subprocess.run([sys.executable, ROOT / 'data' / 'text' / 'prepare.py', 'mine.txt',
                           '--tokenizer=256', '--out=köstlich'], cwd=tmp_path,
                          capture_output=True,
                          env={**os.environ, 'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '1'})
    assert done.returncode == 0, done.stderr
    assert f"--dataset='{tmp_path}/k?stlich'" in done.stdout.decode('ascii')
    assert read_dataset(tmp_path / 'köstlich')[2]['name'] == 'köstlich'
    for args in (['mine.txt', '--out='], ['']):             # not the current folder
        done = subprocess.run([sys.executable, ROOT / 'data' / 'text' / 'prepare.py', *args],
                              cwd=tmp_path, capture_output=True)
        assert done.returncode and b'it is empty' in done.stderr


@each('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_preparing_leaves_nothing(number, tmp_path):
    (tmp_path / 'mine.txt').write_text('some text of mine, and more of it. ' * 999_999)
    process = subprocess.Popen([sys.executable, ROOT / 'data' / 'text' / 'prepare.py', 'mine.txt',
                                '--tokenizer=256', '--out=mine'], cwd=tmp_path,
                               stderr=subprocess.PIPE)
    while process.poll() is None and not [*tmp_path.glob('mine/.tmp-*/*')]:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.communicate()[1] == b'' and process.returncode == 128 + number
    assert not [*(tmp_path / 'mine').iterdir()]


@each('n_words, dtype', [(65_279, np.uint16), (65_280, np.uint32)])
def test_a_vocabulary_of_2_16_is_the_largest_of_16_bits(n_words, dtype, tmp_path):
    """After 256 bytes and n words comes the end of a text, the highest id, 2^16 - 1 or 2^16."""
    letters = [bytes([65 + i % 26 + 32 * (i // 26)]) for i in range(52)]
    words = [b''.join(t) for n in (2, 3) for t in itertools.product(letters, repeat=n)][:n_words]
    text = words[-1].decode() * 50
    tokenizer = tokenizer_dict('bpe', PATTERN, [bytes([b]) for b in range(256)] + words, EOT)
    write(tmp_path, 'x', tokenizer, [('train', text), ('val', text)], math.inf)
    train, val, meta = read_dataset(tmp_path)
    assert train.dtype == dtype and train[-1] == 256 + n_words == meta['vocab_size'] - 1
    assert encoding(meta).decode(train[:-1].tolist()) == text and np.array_equal(train, val)


@each('name, change, says', [
    ('meta.json', None, 'no dataset'), ('val.bin', None, 'cannot read the dataset'),
    ('train.bin', lambda old: b'123', 'truncated'), ('meta.json', lambda old: b'[]', 'cannot'),
    ('meta.json', lambda old: old.replace(b'_size": 256', b'_size": 0'), 'vocab_size = 0'),
    ('train.bin', lambda old: b'\xff' * len(old), 'beyond its vocabulary'),
    *((f'{x}.bin', lambda old: old[2:] + old[:2], 'sha256 is of other') for x in ('train', 'val')),
    ('meta.json', lambda old: old.replace(rb'\\S]', rb'\\S]+'), 'sha256 is of other')])
def test_a_damaged_dataset_is_refused(name, change, says, tmp_path):
    prepare(tmp_path, 'x', [('train', TEXT), ('val', TEXT[:4000])], 256)
    path = tmp_path / name
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    with pytest.raises(ValueError, match=says):
        read_dataset(tmp_path)


def test_a_damaged_meta_json_is_refused_or_works(tmp_path):
    numbers = random.Random(0)
    prepare(tmp_path, 'x', [('train', TEXT), ('val', TEXT[:4000])], 300)
    whole = (tmp_path / 'meta.json').read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[numbers.randrange(len(whole))] = numbers.randrange(256)
        (tmp_path / 'meta.json').write_bytes(damaged)
        try:
            _, val, meta = read_dataset(tmp_path)
            assert encoding(meta).encode_ordinary(encoding(meta).decode(val.tolist()))
        except ValueError as e:
            assert str(e).startswith('cannot read the dataset')


@each('sequences, size', [(0, 31), (6, 6)])
def test_every_epoch_has_each_window_once(sequences, size):
    """Without replacement: of all windows of the data, or of so many, in an order that is a
    function of (seed, step), whatever share of a step ranks and micro-steps take."""
    def starts(steps=4 * size, world=1, **keys):
        config = SimpleNamespace(**{'seed': 1337, 'sequences': sequences, 'block_size': 32,
                                    'batch_size': 4, 'grad_accum': 2, **keys})
        return np.concatenate([window_starts(config, step, 1000, world).ravel()
                               for step in range(steps)])

    epochs = starts().reshape(32, size)
    assert all(set(epoch) == set(epochs[0]) for epoch in epochs) and len(set(epochs[0])) == size
    assert all(start % 32 == 0 and 0 <= start < 1000 - 32 for start in epochs[0])
    assert len({*map(tuple, epochs)}) > 20                                  # none comes again
    assert not np.array_equal(epochs[0], starts(seed=1)[:size])
    assert not sequences or {*starts(seed=1)} != {*epochs[0]}               # a seed draws its own
    for split in ({'grad_accum': 1, 'batch_size': 8}, {'world': 2, 'grad_accum': 1},
                  {'world': 4, 'batch_size': 1}, {'grad_accum': 8, 'batch_size': 1}):
        assert np.array_equal(starts(), starts(**split))


def test_a_name_is_a_folder_in_data_and_a_path_is_a_path(tmp_path, monkeypatch):
    """./python in the current folder is not the dataset python."""
    monkeypatch.chdir(tmp_path)
    for folder in ('python', 'elsewhere'):
        prepare(folder, folder, [('train', 'abc'), ('val', 'abc')], 256)
    parse = lambda name: folder_of(train.parse([f'--dataset={name}']).dataset)
    assert parse('./elsewhere') == str(tmp_path / 'elsewhere')
    assert parse('python') == str(ROOT / 'data' / 'python')
    with pytest.raises(ValueError, match="no dataset 'elsewhere'"):
        read_dataset(parse('elsewhere'))
