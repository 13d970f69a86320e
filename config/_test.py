"""
What a run is told and what it leaves: config files, flags, checkpoints and logs. Later ones win,
what is wrong with them is said in one line, and numbers in a log are what they are called.

    python -m pytest -q config/_test.py
"""
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from config import load, locked, open_log
from data.corpus import prepare, window_starts
from quant import FORMATS, WORDS, Linear
from test_quant import (CONFIGS, ROOT, SIZES, STRATEGIES, TERNARY, TORCHRUN, at_home,        # noqa
                        checkpoint, data, each, equal, error, full, log_of, small)
from train import Config, Run, main, parse


def test_later_files_and_flags_win(tmp_path):
    a, b = tmp_path / 'a.py', tmp_path / 'b.py'
    a.write_text('"""what it is"""\nlearning_rate = 2 * 3e-4 / 4\nn_layer = 2 ** 3\nseed = 1\n')
    b.write_text('n_layer = -1 + 7 - 2\ndropout = 0\n')
    c = parse([str(a), str(b), '--seed=7', '--bias=FALSE', '--prompt=1 + 1'])
    assert (c.learning_rate, c.n_layer, str(c.dropout)) == (1.5e-4, 4, '0.0')
    assert (c.seed, c.bias, c.prompt, c.out_dir) == (7, False, '1 + 1', 'out/a-b')


def test_configs_are_short_and_fit_every_size():
    for path in CONFIGS:
        lines = path.read_text(encoding='utf-8').splitlines()
        assert lines[0].startswith('# ') and sum(not x.startswith('#') for x in lines) <= 15
    for size, name in [*itertools.product(['gpt2_xl'], STRATEGIES),     # 1600 = 25 x 64
                       *itertools.product(SIZES, ['everything'])]:
        codes = ['--stored=int2/64'] * (name == 'peqa')
        train.parse([f'config/{size}.py', *codes, f'config/{name}.py', '--batch_size=1'])


def test_help_lists_every_key_and_every_word(capsys):
    with pytest.raises(SystemExit) as e:
        main(['--help'])
    words, out = [*vars(Config()), *FORMATS, *sum(WORDS.values(), [])], capsys.readouterr().out
    assert not e.value.code and all(re.search(rf'\b{word}\b', out) for word in words)


@each('line, says', [('n_layer = "2"', 'n_layer must be an int'), ('import os', 'key = value'),
    ('learnng_rate = 1', "unknown key 'learnng_rate', did you mean 'learning_rate'"),
    ('n_layer = open("x")', 'must be an int'), ('n_layer = = 2', '(of a checkpoint the'),
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


def test_an_argument_that_another_would_undo_is_refused(full, small):
    path = f'{full}/ckpt.pt'
    for flag, key in ('--seed=3', 'seed'), ('--init_from=resume', 'init_from'):
        assert f'would undo {key}' in error(flag, path, *small)
    assert parse([path, 'config/qaft.py']).out_dir == f'out/{full.name}-qaft'
    assert parse(['--out_dir=x/']).out_dir == 'x'                       # its hints name x, not x/
    assert 'log_interval = 0 must be at least 1' in error(*small, '--log_interval=0')
    for key, x in ('n_head', 1), ('norm_eps', .1), ('tied', False), ('rope_theta', 5.):
        assert f'another {key}' in error(path, *small[:-1], f'--out_dir={full}x', f'--{key}={x}')


def test_a_checkpoint_hands_on_the_model_and_not_the_run(small, tmp_path):
    main([*small, '--overwrite=True', '--prompt=x', '--max_iters=1', '--top_k=1',
          '--temperature=.5', '--samples=2'])
    path = tmp_path / 'run' / 'ckpt.pt'
    c, before = parse([str(path)]), path.read_bytes()
    assert (c.n_layer, c.out_dir, c.overwrite, c.device) == (2, 'out/run', False, 'auto')
    assert all(vars(c)[key] == getattr(Config, key) for key in (
        'prompt', 'top_k', 'temperature', 'samples', 'sample_tokens'))
    # nor may a new run throw it away
    assert 'would throw away' in error(path, f'--out_dir={path.parent}', '--overwrite=True')
    # not even for one that the vocabulary does not let begin
    blocks = [f'--{key}=int8/512' for key in ('weights', 'activations', 'gradients')]
    assert 'do not divide' in error(
        *small, *blocks, '--overwrite=True', '--quantize_head=True', '--backward=requantize',
        '--n_embd=512', '--hidden=512', '--batch_size=16')
    assert path.read_bytes() == before


@each('flags, says', [
    ('seed=2', 'trained with seed'), ('learning_rate=1.', 'trained with learning_rate'),
    ('beta1=.5', 'trained with beta1'), ('warmup_iters=3', 'trained with warmup_iters'),
    ('sequences=8', 'trained with sequences'), ('ptq=rtn', 'trained with ptq'),
    ('dataset={other} --max_iters=61', 'another sha256'), ('dataset={same}', ''),
    ('eval_tokens=64 --final_tokens=64 --log_interval=2 --top_k=0 --device=cpu', '')])
def test_what_may_change_when_a_run_is_resumed(flags, says, full, data, tmp_path):
    prepare(tmp_path / 'other', 'other', [(split, 'abc ' * 999) for split in ('train', 'val')], 256)
    (tmp_path / 'same').symlink_to(data)
    flags = flags.format(other=tmp_path / 'other', same=tmp_path / 'same')
    args = [f'--out_dir={full}', '--init_from=resume', *f'--{flags}'.split()]
    assert says in error(*args) if says else parse(args).n_layer == 2
    path = f'{full}/ckpt.pt'
    assert f'give --out_dir={full} in place of {path}' in error(path, *args)


def test_an_evaluation_is_the_loss_of_windows_all_over_the_text(full):
    run = Run(parse([f'{full}/ckpt.pt', '--eval_only=True', '--dropout=.5']), 0, 1)
    ids = torch.from_numpy(run.val_data.astype(np.int64))
    windows = torch.stack([ids[i:i + 33] for i in np.linspace(0, len(ids) - 33, 5).astype(int)])
    x, y = windows[:, :-1], windows[:, 1:]
    loss, *_, before, last = run.evaluate(5 * 32, run.val_data), *log_of(full)
    assert run.seconds == last['seconds'] > 0
    most = (len(ids) - 1) // 32 * 32                                    # no window twice
    assert run.evaluate(2 * most, run.val_data) == run.evaluate(most, run.val_data)
    logits = run.model.eval()(x).flatten(0, 1)
    assert loss == pytest.approx(F.cross_entropy(logits, y.flatten()).item(), rel=1e-5)
    assert before['val_loss'] == pytest.approx(loss)                    # eval_tokens; final_tokens
    assert last['loss_on_train'] == pytest.approx(run.evaluate(1024 // 8, run.train_data))


def test_an_evaluation_repeats_its_noise_and_writes_nothing(small, data, tmp_path, capsys):
    main([*small, '--activations=int2/row/stochastic'])
    folder, args = tmp_path / 'run', [f'{tmp_path}/run/ckpt.pt', '--eval_only=True']
    files = lambda: {path.name: path.read_bytes() for path in folder.iterdir()}
    loss, before = log_of(folder)[-1]['val_loss'], files()
    run = Run(parse(args), 0, 1)
    assert run.evaluate(1024, run.val_data) == loss
    with locked(str(folder)):
        main([*args, f'--out_dir={folder}'])
    out = capsys.readouterr().out
    assert f'val loss {loss:.4f} nats' in out and 'not what it was trained on' not in out
    prepare(tmp_path / 'b', 'b', [(split, 'abc ' * 999) for split in ('train', 'val')], 256)
    main([*args, f'--dataset={tmp_path}/b'])
    assert 'not what it was trained on' in capsys.readouterr().out and files() == before


def test_processes_and_micro_steps_have_noise_of_their_own(small, monkeypatch):
    run, keys = Run(parse([*small, '--grad_accum=2', '--activations=int8/stochastic']), 0, 1), []
    run.model.register_forward_pre_hook(lambda model, _: keys.extend([torch.initial_seed(), *(
        int(layer.key) for layer in model.modules() if isinstance(layer, Linear))]))    # of dropout
    monkeypatch.setattr(train.dist, 'all_reduce', lambda t: None)
    for run.world, run.rank, run.step in (1, 0, 1), (2, 0, 2), (2, 1, 2):
        run.advance()
    assert len({*keys}) == len(keys) == 3 * 2 * (1 + 9)


def test_micro_steps_are_one_batch(small):
    clips, small = [], [*small, '--grad_clip=1e-3', '--overwrite=True']
    for n in 1, 2:
        run = Run(parse([*small, f'--batch_size={4 // n}', f'--grad_accum={n}']), 0, 1)
        run.advance()
        clips.append(run.optimizer.rates['matrix'][-1].item())
    assert clips[0] == pytest.approx(clips[1], rel=1e-3)


def test_a_log_line_is_about_the_steps_since_the_last(small, full, tmp_path, monkeypatch):
    first, *steps, last = log_of(full)
    steps = [line for line in steps if 'schedule' in line]
    config = Config(**first['config'])
    assert all(s['schedule'] == train.schedule(config, s['iter'] - 1) for s in steps)
    assert sum(4 * 32 / s['tokens_per_s'] for s in steps) == pytest.approx(last['seconds'])
    monkeypatch.setattr(train.time, 'perf_counter', itertools.count().__next__)
    for n in 1, 3:
        main([*small, f'--log_interval={n}', f'--out_dir={tmp_path}/{n}', '--compile=no'])
        assert log_of(tmp_path / f'{n}')[-1]['seconds'] == 6            # a step takes one
    a, b = ([line['train_loss'] for line in log_of(tmp_path / f'{n}') if 'train_loss' in line]
            for n in (1, 3))
    assert b == pytest.approx([sum(a[:3]) / 3, sum(a[3:]) / 3])
    path = tmp_path / 'log'
    path.write_text('{"config": 1}\n{"iter": 2}\n{"iter": 2, "done": true}\n{"iter": 3}\n{"it')
    open_log(str(path), 2).close()
    assert path.read_text() == '{"config": 1}\n{"iter": 2}\n'


def test_a_seed_is_a_model_and_sequences_are_windows(small, full, tmp_path, monkeypatch):
    a, b = (Run(parse([*small, '--overwrite=True', f'--seed={s}']), 0, 1).model for s in (1, 2))
    assert not torch.equal(a.wte.weight, b.wte.weight)
    run = Run(parse([f'{full}/ckpt.pt', '--sequences=6', '--eval_only=True']), 0, 1)
    starts = window_starts(replace(run.config, batch_size=6), 0, len(run.train_data), 1).ravel()
    assert sorted(run.sequences().tolist()) == sorted(
        run.train_data[i:i + 32].tolist() for i in starts)
    monkeypatch.setattr(train, 'gptq_', lambda *how: starts.put([0, 1], how[3:5]))
    Run(parse([f'{full}/ckpt.pt', 'config/gptq.py', *small, '--overwrite=True', '--sequences=6',
               '--damping=7.', '--act_order=False']), 0, 1)
    assert (*starts[:2],) == (7, False)


def test_killed_while_saving_and_resumed(small, tmp_path):
    """kill -9, on Linux of torchrun: out_dir holds a whole checkpoint, and goes on."""
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    args = ['config/ternary.py', *small, '--eval_interval=1', '--max_iters=30']
    torchrun = [*TORCHRUN, '--nproc_per_node=1'] if sys.platform == 'linux' else []
    process = subprocess.Popen([sys.executable, *torchrun, 'train.py', *args,
                                f'--out_dir={killed}'], cwd=ROOT, stdout=subprocess.PIPE)
    main([*args, f'--out_dir={whole}'])
    while process.poll() is None and len([*killed.glob('ckpt.pt*')]) < 2:   # one is ckpt.pt.tmp
        time.sleep(0.0005)
    process.kill()
    process.communicate(timeout=20)                                     # nobody is left to write
    assert process.returncode == -signal.SIGKILL and 0 < checkpoint(killed)['iter'] < 30
    main([f'--out_dir={killed}', '--init_from=resume'])
    assert equal(checkpoint(whole), checkpoint(killed))


def test_a_closed_stdout_loses_nothing(small, tmp_path):
    process = subprocess.Popen([sys.executable, 'train.py', *small], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert b'Error' not in process.stderr.read() and process.wait() == 0
    assert checkpoint(tmp_path / 'run')['iter'] == 6 and log_of(tmp_path / 'run')[-1]['done']


def test_only_a_lack_of_memory_is_called_so(small, monkeypatch):
    def fails(*_):
        raise RuntimeError(says)
    monkeypatch.setattr(Run, 'advance', fails)
    for says in 'CUDA out of memory. Tried ..', 'you tried to allocate memory', 'ALLOC_FAILED':
        assert 'lower batch_size' in error(*small, '--overwrite=True')
    for says in 'an illegal memory access was encountered', 'unsupported memory format':
        with pytest.raises(RuntimeError, match=says):
            main([*small, '--overwrite=True'])


def test_another_tokenizer_of_the_same_size_is_refused(small, tmp_path, monkeypatch):
    path, new = tmp_path / 'run' / 'ckpt.pt', f'--out_dir={tmp_path / "new"}'
    for name, text in (('a', 'the cat sat on the mat, and '), ('b', 'a fox? ')):
        prepare(tmp_path / name, name, [('train', text * 99), ('val', text * 99)], 258)
    train.main([*small, f'--dataset={tmp_path}/a', '--max_iters=1'])
    prepare(tmp_path / 'c', 'c', [('train', text * 99), ('val', text * 99)], path)  # a's tokens
    assert f'another tokenizer (prepare text with --tokenizer={path})' in error(
        path, *small, f'--dataset={tmp_path}/b', new)
    assert 'another tokenizer' in error(path, f'--dataset={tmp_path}/b', '--eval_only=True')
    train.main([str(path), *small, f'--dataset={tmp_path}/c', new, '--max_iters=1'])
    done, meta = log_of(tmp_path / 'run')[-1], json.loads((tmp_path / 'a/meta.json').read_text())
    bits = done['val_loss'] / math.log(2)               # per token; and a token has 1.1 bytes
    assert done['val_bpb'] == pytest.approx(bits / meta['bytes_per_token'])
    begun = []                                          # without a prompt, by the end of a text
    monkeypatch.setattr(train.GPT, 'generate', lambda model, idx, *how: begun.append(
        (model.training, idx.tolist(), *how[:3], how[3].initial_seed())) or [])
    args = [str(path), f'--dataset={tmp_path}/a', '--eval_only=True', '--prompt=']
    Run(parse([*args, '--samples=2', '--top_k=3', '--temperature=.5']), 0, 1).sample()
    assert begun == [(False, [[257]], 256, 0.5, 3, seed) for seed in (1337, 1338)]
    assert [*meta['special'].values()] == [257]


@each('how', ['int4/row', 'ternary/tensor/absmean'])
def test_a_fine_tuned_model_is_packed_without_loss(how, small, full, tmp_path):
    tuned, packed = tmp_path / 'tuned', tmp_path / 'packed'
    train.main([str(full / 'ckpt.pt'), 'config/qaft.py', *small, f'--weights={how}',
                '--max_iters=9', '--sequences=32', f'--out_dir={tuned}'])
    rtn = [str(tuned / 'ckpt.pt'), '--ptq=rtn', f'--stored={how}', f'--out_dir={packed}']
    train.main(rtn)
    for flag in ('--ptq=gptq', '--stored=int3/row'):
        assert f'--ptq=rtn --stored={how} packs' in error(*rtn, '--sequences=8', flag)
    a, b = log_of(tuned)[-1], log_of(packed)[-1]
    assert a['val_loss'] == b['val_loss'] and b['bytes']['linear']['weights'] < 0.6


def test_start_from_a_checkpoint(small, full, tmp_path):
    new = [str(full / 'ckpt.pt'), *small, '--max_iters=1']
    for i, how in enumerate(('--weights=int8/row', 'config/ternary.py', 'config/direct8.py')):
        train.main([*new, how, f'--out_dir={tmp_path}/{i}'])
        assert log_of(tmp_path / str(i))[1]['train_loss'] < 4           # it has learned before
    ternary, gptq = [tmp_path / '1' / 'ckpt.pt', *small], ['config/gptq.py', '--sequences=8']
    for flags in (['--stored=int8/row'], gptq, [*gptq, f'--stored={TERNARY}']):
        assert f'already: use --stored={TERNARY}' in error(*ternary, *flags, '--compute=float')


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
