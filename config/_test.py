"""
Config files, flags and checkpoints: what they say wins in their order, and what is wrong with them
is said in one line.

    python -m pytest -q config/_test.py
"""
import re

import pytest
import torch

from config import load
from quant import FORMATS, WORDS
from test_quant import at_home, checkpoint, data, each, equal, error, full, small   # noqa: F401
from train import Config, main, parse


def test_later_files_and_flags_win(tmp_path):
    a, b = tmp_path / 'a.py', tmp_path / 'b.py'
    a.write_text('"""what it is"""\nlearning_rate = 2 * 3e-4\nn_layer = 2 ** 3\nseed = 1\n')
    b.write_text('n_layer = -1 + 5\ndropout = 0\n')
    c = parse([str(a), str(b), '--seed=7', '--bias=FALSE', '--prompt=1 + 1'])
    assert (c.learning_rate, c.n_layer, str(c.dropout)) == (2 * 3e-4, 4, '0.0')
    assert (c.seed, c.bias, c.prompt, c.out_dir) == (7, False, '1 + 1', 'out/a-b')


def test_help_lists_every_key_and_every_word(capsys):
    with pytest.raises(SystemExit) as e:
        main(['--help'])
    words, out = [*vars(Config()), *FORMATS, *sum(WORDS.values(), [])], capsys.readouterr().out
    assert not e.value.code and all(re.search(rf'\b{word}\b', out) for word in words)


@each('line, says', [('n_layer = "2"', 'n_layer must be an int'), ('import os', 'key = value'),
    ('learnng_rate = 1', "unknown key 'learnng_rate', did you mean 'learning_rate'"),
    ('n_layer = open("x")', 'must be an int'), ('n_layer = = 2', 'not a config file'),
    ('n_layer += 1', 'key = value'), ('weights = 8', 'weights must be a str')])
def test_a_bad_config_file_names_file_and_line(line, says, tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '8')                                     # on each machine
    (tmp_path / 'bad.py').write_text(f'# a comment\n{line}\n')
    said = error(tmp_path / 'bad.py')
    assert says in said and f'{tmp_path}/bad.py:2' in said


@each('arg', '-{} --{}=1 {}.py {}.pt --dataset={} --n_layer={} --device={} --init_from={} '
             '--out_dir={} --learning_rate={}1 --weights={} --weights=int8/{}'.split())
def test_a_long_argument_gives_a_short_line(arg, small):
    assert all(error(*small, arg.format(x * 100_000)) for x in 'x(9-')


def test_flipped_bits_are_found(full, small, tmp_path):
    """Anywhere in ckpt.pt: it is refused in one line, or nothing that counts has changed."""
    whole, path, refused = (full / 'ckpt.pt').read_bytes(), tmp_path / 'bad.pt', 0
    for i in range(20):
        damaged = bytearray(whole)
        damaged[(2 * i + 1) * len(whole) // 40] ^= 1 << i % 8
        path.write_bytes(damaged)
        try:
            assert equal(load(str(path), Config), checkpoint(full))
        except SystemExit as e:
            refused += e.code.startswith('error: ') and '\n' not in e.code
    assert refused > 10                                                 # most of it is tensors
    torch.save({**checkpoint(full), 'config': [1]}, tmp_path / 'foreign')
    for damaged in (b'', b'not one', whole[:5000], (tmp_path / 'foreign').read_bytes()):
        path.write_bytes(damaged)
        assert 'not a whole checkpoint' in error(path, *small)
