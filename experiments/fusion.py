"""
What torch.compile makes for a GPU, seen without one: python -m experiments.fusion [configs, flags]

    python -m experiments.fusion                            every strategy of STRATEGIES
    python -m experiments.fusion config/ternary.py          one, of config files and flags
    --ptx                  compile each Triton kernel for sm_90: registers and spills
    --numerics             run graphs in Triton's interpreter, and compare with eager

The model and the optimizer are the project's own, compiled by GPT.compile and Optimizer, at the
shapes of GPT-2 124M: 16 sequences of 1024 tokens, bfloat16. no_gpu.py makes torch believe in a GPU.

What is counted. A kernel is Triton code of pointwise operations and reductions, Triton code of a
matmul with what is fused to it (template), or a call of cuBLAS or flash attention (extern). It
moves each buffer that it reads once, and each that it writes, whatever a cache does; so a
reduction that reads its input twice, in two loops, reads it once, and of extern calls with
several outputs only what they read is known. "Of Triton" leaves extern calls out, and is what is
compared. Necessary is, of an update, every input once and every tensor that it writes once; of
other graphs the same of each connected part between two matmuls, as one kernel, an estimate that
good fusion can beat by a few percent. Which matmul wins is not measured but assumed: Triton
for int8, cuBLAS for all else. Launches of a step are the kernels of all updates of the 12 layers
and what runs outside of them; copies go from host to device.

Needs torch 2.13 for the CPU, triton and g++. Prints a table; with --ptx, --numerics and nothing
else it writes all of it to experiments/results/fusion.json.
"""
import argparse
import functools
import importlib.metadata
import json
import os
import re
import sys
import tempfile
from collections import Counter
from datetime import date
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.no_gpu import (differences, graphs, lacking, machine_code, now, pretending,
                                triton_kernels)

STRATEGIES = {
    'bf16': [], 'w8a8': ['config/w8a8.py'], 'w8a8g8': ['config/w8a8g8.py'],
    'fp8 fold': ['config/w8a8g8.py', '--weights=fp8/row', '--activations=fp8/row',
                 '--gradients=fp8e5/row/stochastic'],
    'w4a4g4': ['config/w4a4g4.py'], 'adam8': ['config/adam8.py'], 'adam4': ['config/adam4.py'],
    'ternary': ['config/ternary.py']}
SIZE, VOCABULARY = ['config/gpt2.py', '--batch_size=16'], 50304

# ------------------------------------------------------------------------------------------------
# what a graph moves, and what it must

def traffic(graph):
    """[(kind, bytes read, bytes written)] of the kernels of a lowered graph."""
    from torch._inductor import dependencies, scheduler
    real, rows = graph.scheduler.mutation_real_name, []

    def hint(expression):
        return int(graph.sizevars.optimization_hint(expression, fallback=1))

    def add(found, dep):
        name = real.get(dep.name, dep.name)
        buffer = graph.get_buffer(name) or graph.graph_inputs.get(name)
        try:
            item = buffer.get_dtype().itemsize
            full = hint(torch._inductor.utils.sympy_product(buffer.get_size())) * item
        except NotImplementedError:     # a call with several outputs has no size; each of them has
            return
        part = full if isinstance(dep, dependencies.StarDep) else hint(dep.get_numel()) * item
        found[name] = min(full, found.get(name, 0) + part)      # slices add up to the whole

    for node in graph.scheduler.nodes:
        if isinstance(node, scheduler.NopKernelSchedulerNode) or (
                node.is_extern() and type(node.node).__name__ == 'MultiOutput'):
            continue
        read, written = {}, {}
        for dep in node.read_writes.reads:
            inside = dep.name in node.get_buffer_names()
            if not isinstance(dep, dependencies.WeakDep) and not inside:
                add(read, dep)
        for dep in node.read_writes.writes:
            if dep.name not in graph.removed_buffers:
                add(written, dep)
        kind = 'extern' if node.is_extern() else 'template' if node.is_template() else 'triton'
        rows.append((kind, sum(read.values()), sum(written.values())))
    return rows


MATMULS = ('mm', 'addmm', 'bmm', 'baddbmm', '_int_mm', '_scaled_mm',
           '_scaled_dot_product_flash_attention', '_scaled_dot_product_flash_attention_backward')
VIEWS = {'view', 'reshape', '_unsafe_view', 'permute', 't', 'transpose', 'expand', 'slice',
         'select', 'squeeze', 'unsqueeze', 'split', 'split_with_sizes', 'getitem', 'alias',
         'detach', 'as_strided', 'unbind', 'unfold'}
FREE = {'full', 'iota', 'scalar_tensor', 'arange', 'empty'}     # made where they are used


def op(node):
    """The bare name of a node's operation: mm, view .."""
    target = getattr(node.target, '_schema', node.target)
    name = getattr(target, 'name', '') or getattr(target, '__name__', '')
    return name.split('::')[-1].split('.')[0] if node.op == 'call_function' else ''


def size(node, width=None):
    """Bytes of what a node stands for; an expanded axis counts once."""
    value = node.meta.get('val')
    tensors = value if isinstance(value, (tuple, list)) else [value]
    return sum((width or t.dtype.itemsize)
               * torch.Size(n for n, s in zip(t.shape, t.stride()) if s).numel()
               for t in tensors if isinstance(t, torch.Tensor))


def count(node):
    return size(node, 1)


def users_of(node):
    """What uses a node, or a view of it."""
    return {v for u in node.users for v in (users_of(u) if op(u) in VIEWS else [u])}


def source(node):
    """What a node is a view of."""
    while op(node) in VIEWS and not (op(node) == 'getitem' and op(node.args[0]) in MATMULS):
        node = node.all_input_nodes[0]
    return node


def necessary(module):
    """Bytes that a graph must move: of what lies between matmuls each connected part is a kernel,
    which reads once and writes once. What is cheaper to make anew than to write and read is made
    anew; an int8 matmul, whose result is four times as wide, is part of the kernel after it."""
    nodes = list(module.graph.nodes)
    ours = {n for n in nodes if size(n) and op(n) and op(n) not in {*MATMULS, *VIEWS, *FREE}}
    level, parent, read, written = {}, {n: n for n in ours}, {}, {}

    def root(n):
        while parent[n] is not n:
            n = parent[n]
        return n

    @functools.cache
    def kept(n):        # is in memory: inputs, what matmuls read and write, outputs, reductions
        users = [u for u in users_of(n) if u.op == 'output' or op(u) in (*MATMULS, 'copy_')]
        return n not in ours or users or any(count(a) > count(n) for a in n.all_input_nodes)

    @functools.cache
    def bases(n):       # what n is made of that is in memory
        return {n} if kept(n) else {b for a in n.all_input_nodes for b in bases(source(a))}

    # a part lies on one level: as many matmuls before it on the longest path, or as late as what
    # it is for
    for n in nodes:
        level[n] = max((level[a] + (op(a) in MATMULS) for a in n.all_input_nodes), default=0)
    for n in reversed(nodes):
        users = [level[u] for u in n.users if u.op == 'call_function']
        if users and len(users) == len(n.users) and op(n) not in (*MATMULS, 'copy_'):
            if n not in ours or all(count(a) <= count(n) for a in n.all_input_nodes):
                level[n] = max(level[n], min(users))
    for n in ours:
        for a in map(source, n.all_input_nodes):
            if a in ours and level[a] == level[n]:
                parent[root(n)] = root(a)
    parts, needs, readers = {n: root(n) if n in ours else n for n in nodes}, {}, {}
    for n in nodes:
        part, wants = parts[n], needs.setdefault(parts[n], set())
        if op(n) == 'copy_':
            written[n] = size(n)
        for a in n.all_input_nodes[op(n) == 'copy_':]:
            s = source(a) if op(n) not in VIEWS else a
            new = {b for b in bases(s) if op(b) not in FREE and (part, b) not in read
                   and parts[b] is not part}
            if n in ours and s in ours and part is not parts[s] and not kept(s) and (
                    sum(map(size, new)) <= 2 * size(s)):
                read |= {(part, b): size(b) for b in new if op(b) != '_int_mm'}
                wants |= {parts[b] for b in new}
            elif part is not parts[s]:
                wants.add(parts[s])
                if s in ours and op(s) != 'copy_' and op(n) not in VIEWS:
                    written[s] = size(s)
                if n in ours and op(s) not in {*FREE, '_int_mm'} or op(n) == '_int_mm':
                    read[part, s] = max(read.get((part, s), 0), min(size(a), size(s)))

    # kernels of which none needs another can be one, and read together: of those that read the
    # same, as many reads are left as stand in a row
    @functools.cache
    def before(part):
        return needs[part].union(*map(before, needs[part] - {part}))

    for part, s in read:
        readers.setdefault(s, []).append(part)
    reads = 0
    for s, found in readers.items():
        @functools.cache
        def row(part):
            return 1 + max((row(p) for p in before(part).intersection(found)), default=0)

        reads += max(map(row, found)) * max(read[p, s] for p in found)
    return reads + sum(written.values())


# ------------------------------------------------------------------------------------------------
# the graphs of a strategy

def look(made):
    """A graph as a row of the results."""
    with torch._inductor.virtualized.V.set_graph_handler(made.graph):
        rows = traffic(made.graph)
    moved = {kind: sum(r + w for k, r, w in rows if k == kind)
             for kind in ('triton', 'template', 'extern')}
    # pointwise, reduction ..: what Inductor's heuristics call a kernel
    kinds = {name: re.search(r'@triton_heuristics\.(\w+)', text)[1]
             for name, text in triton_kernels(made.source).items()}
    least = necessary(made.graph.module)
    return {'graph': made.label, 'extern': sum(k == 'extern' for k, _, _ in rows),
            'kernels': Counter(kinds[c[:-4]] for c in made.launches if c[-4:] == '.run'),
            'read': sum(r for _, r, _ in rows), 'written': sum(w for _, _, w in rows),
            **{f'{kind}_bytes': n for kind, n in moved.items()}, 'necessary': least,
            'ratio': (moved['triton'] + moved['template']) / least}


class Eager(TorchDispatchMode):
    """Counts what runs outside of graphs: copies to the device, and launches."""

    def __init__(self):
        super().__init__()
        self.copies = self.launches = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_cuda and not f.is_view:
            new = f.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_strided)
            from_host = any(isinstance(t, torch.Tensor) and not t.is_cuda for t in args)
            self.copies += from_host
            self.launches += not (from_host or new)
        return out


def strategy(args, quick=False):
    """Compile what a training step of the strategy compiles, and one Linear by itself; returns a
    dict of what came of it. Quick: that Linear and its update alone."""
    from torch._dynamo.utils import counters        # not before there is a GPU
    from torch._subclasses.fake_tensor import FakeTensorMode
    import quant
    from model import GPT
    from train import parse
    torch._dynamo.reset()
    counters.clear()
    graphs.clear()
    config, tokens = parse([*SIZE, *args]), 16384
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device('cuda'):
            gpt = GPT(config, VOCABULARY)
            idx = torch.zeros(config.batch_size, config.block_size, dtype=torch.long)
            x, grad = (torch.zeros(tokens, n, dtype=torch.bfloat16) for n in (768, 3072))
        gpt.dtype = torch.bfloat16
        quant.rtn_(gpt, config.stored)
        gpt.compile()
        if not quick:
            embedded, angles = gpt.embed(idx)
            now.label = 'block forward'
            y = gpt.h[0](embedded, angles, None)
            now.label = 'block backward'
            y.backward(torch.empty_like(y))
            now.label = 'loss of a chunk'
            gpt.lm_head.loss(y, idx)

        optimizer = quant.Optimizer(gpt, config, compiled=True)
        optimizer.begin(0.5, 1.0)
        now.launches = 0
        for name, (kind, p, w) in optimizer.parts.items():
            if quick and name != 'h.0.mlp.c_fc.weight':
                continue
            p.grad = torch.empty(p.shape, device='cuda')
            now.label = f'update {kind} {" x ".join(map(str, p.shape))}'
            optimizer.apply(name)
        launches = now.launches
        optimizer.steps = dict.fromkeys(optimizer.steps, lambda *a: None)
        with Eager() as eager:          # the same step, but for its graphs
            optimizer.step(0.5, 1.0)

        # a Linear, with the options that a block gets
        layer = gpt.h[0].mlp.c_fc
        GPT.compile(SimpleNamespace(config=config, wte=gpt.wte, h=[layer], lm_head=gpt.lm_head))
        now.label = 'linear forward'
        y = layer(x.requires_grad_())
        now.label = 'linear backward'
        y.backward(grad)
    return {'graphs': [look(made) for made in graphs], 'copies': eager.copies,
            'launches': launches + eager.launches,
            'graph_breaks': sum(counters['graph_break'].values())}


# ------------------------------------------------------------------------------------------------
# --ptx and --numerics: what the kernels become, and what they compute

def ptx():
    """Machine code of the kernels of all graphs, each once."""
    found, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for made in graphs:
            for name, text in triton_kernels(made.source).items():
                body = text.replace(name, '')
                try:
                    found[body] = found.get(body) or machine_code(name, text, folder)
                except Exception as e:
                    failed.append(f'{made.label}: {name}: {type(e).__name__}: {e}'[:300])
    return {'compiled': len(found), 'failed': failed, 'spilled': sum(n for _, n in found.values()),
            'registers': max((n for n, _ in found.values()), default=0)}


def numerics():
    """{what: differences}, of small shapes."""
    import quant
    from quant import How, QTensor, Rates, quantize
    torch.manual_seed(0)
    x, g, key = *torch.randn(2, 24, 128), torch.tensor(12345, dtype=torch.int32)
    h = torch.tensor(Rates(0.3, 0.01, 0.9, 0.99, 0.5, 0.3, 1e-8, 0.7))
    results = {'hash': differences(lambda x, key: (quant.uniform(x, key),), x, key)}
    for how in ('int8/row', 'int8/row/stochastic', 'ternary/row/absmean', 'int4/32/stochastic',
                'uint8/64/root4'):
        results[how] = differences(lambda x, key: quantize(x.abs() if how[0] == 'u' else x, how,
                                                           key)[:2], x, key)
    for name, m, v in (('adam8', 'int8/64/sqrt', 'uint8/64/root4'),
                       ('adam4', 'int4/64/sqrt', 'uint4/64/root4')):
        m, v = quantize(x * 0.1, m), quantize(x ** 2 * 0.1, v)
        results[f'update {name}'] = differences(
            lambda w, g, a, b, c, d, h, key: (quant.adamw_step(
                QTensor(w), g, QTensor(a, b, spec=m.spec), QTensor(c, d, spec=v.spec), h, key),
                )[:0], x, g, *m[:2], *v[:2], h, key)
    w, m, v = (quantize(t, how) for t, how in (
        (x, 'ternary/row/absmean'), (x * 0.1, 'int8/row'), (x ** 2 * 0.1, 'rank1')))
    results['update ternary'] = differences(
        lambda g, a, b, c, d, e, f, m_s, v_s, h, key: (quant.direct_step(
            QTensor(a, b, spec=w.spec), g, QTensor(c, d, spec=m.spec), QTensor(e, f, spec=v.spec),
            QTensor(m_s), QTensor(v_s), h, h, key), ),
        g, *w[:2], *m[:2], *v[:2], *torch.rand(2, 24, 1), h, key)
    q, w = quantize(x, 'int8/row'), quantize(torch.randn(96, 128), 'int8/row')
    how = How('int8/row', 'int8/row', 'int8/row/stochastic', backward='fold', compute='codes')
    results['backward on codes'] = differences(
        lambda g, a, b, c, d, key: quant.matmul_backward(
            g, QTensor(a, b, spec=q.spec), QTensor(c, d, spec=w.spec), how, key),
        torch.randn(24, 96), *q[:2], *w[:2], key)
    return results


def measure(strategies, quick=False, to_code=False):
    """{name: what came of it}, of {name: arguments for train.py}."""
    found = {}
    for name, args in strategies.items():
        found[name] = strategy(args, quick) | {'args': args}
        if to_code:
            found[name]['ptx'] = ptx()
        print(name, 'done', file=sys.stderr, flush=True)
    return found


# ------------------------------------------------------------------------------------------------
# the tables

KINDS = ('pointwise', 'reduction', 'persistent_reduction', 'template')


def bars(found):
    """[(row, value, bar, stretch)] of what was measured; bytes as in the docstring."""
    def triton(name, graph, *more):
        g = next(g for g in found[name]['graphs'] if g['graph'] == graph)
        return sum(g[f'{kind}_bytes'] for kind in ('triton', 'template', *more))

    def update(name):
        of = [g for g in found[name]['graphs'] if re.match('update (adamw|direct)', g['graph'])]
        return sum(g['read'] + g['written'] for g in of) / sum(g['necessary'] for g in of)

    def worst(key):
        return max(r['ptx'][key] if key == 'spilled' else len(r['ptx'][key])
                   for r in found.values())

    rows = [(f'bytes / necessary, update, {name}', (name,), lambda name=name: update(name), *goals)
            for name, *goals in (('adam8', 1.25, 1.05), ('adam4', 1.5, 1.1), ('ternary', 2, 1.3))]
    rows += [(f'Triton bytes, block {way}, {name} to bf16', (name, 'bf16'),
              lambda a=name, way=f'block {way}': triton(a, way) / triton('bf16', way), *goals)
             for way, name, *goals in (('forward', 'w8a8', 1, 0.7), ('backward', 'w8a8g8', 1.3, 1))]
    rows += [
        ('MB, w4a4g4 Linear backward, extern too', ('w4a4g4',),
         lambda: triton('w4a4g4', 'linear backward', 'extern') / 1e6, 1200, 700),
        ('copies to the device, ternary step', ('ternary',),
         lambda: found['ternary']['copies'], 2, 1),
        ('launches, ternary step', ('ternary',), lambda: found['ternary']['launches'], 250, 100),
        ('graph breaks', (), lambda: max(r['graph_breaks'] for r in found.values()), 0, None)]
    if all('ptx' in r for r in found.values()):
        rows += [('bytes spilled', (), lambda: worst('spilled'), 0, None),
                 ('kernels that fail for sm_90', (), lambda: worst('failed'), 0, None)]
    return [(name, value(), *goals) for name, needs, value, *goals in rows
            if found.keys() >= {*needs}]


def table(found):
    """Lines of markdown; a graph like one of a strategy above is left out."""
    yield (f'| strategy | graph | {" | ".join(KINDS).replace("_reduction", "")} | extern | '
           'read, MB | written, MB | of Triton, MB | necessary, MB | ratio |')
    yield '|' + '---|' * (len(KINDS) + 8)
    seen = []
    for name, result in found.items():
        for g in result['graphs']:
            if g not in seen:
                seen.append(g)
                sizes = [g['read'], g['written'], g['triton_bytes'] + g['template_bytes'],
                         g['necessary']]
                cells = [name, g['graph'], *(g['kernels'].get(k, 0) for k in KINDS), g['extern'],
                         *(f'{n / 1e6:.1f}' for n in sizes), f'{g["ratio"]:.2f}']
                yield f'| {" | ".join(map(str, cells))} |'
    yield ('\n| strategy | graph breaks | copies of a step | launches | compiled for sm_90 '
           '| failed | most registers | bytes spilled |\n|' + '---|' * 8)
    for name, r in found.items():
        p = r.get('ptx', {})
        cells = [name, r['graph_breaks'], r['copies'], r['launches'], p.get('compiled', ''),
                 len(p['failed']) if p else '', p.get('registers', ''), p.get('spilled', '')]
        yield f'| {" | ".join(map(str, cells))} |'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ptx', action='store_true')
    parser.add_argument('--numerics', action='store_true')
    options, args = parser.parse_known_args()
    if reason := lacking():
        sys.exit(f'error: {reason}')
    from experiments.runs import RESULTS, ROOT, machine
    os.chdir(ROOT)                                      # where config/ is
    strategies = {' '.join(os.path.basename(a).removesuffix('.py') for a in args): args}
    found = pretending('measure', strategies if args else STRATEGIES, False, options.ptx)
    print('\n'.join(table(found)))
    rows = [] if args else bars(found)
    if rows:
        print('\n| bar | value | bar | stretch |\n|---|---|---|---|')
        for name, value, *goals in rows:
            print(f'| {name} | {value:.4g} | {goals[0]} | {goals[1]} |')
    content = {'machine': machine(), 'date': str(date.today()), 'torch': torch.__version__,
               'triton': importlib.metadata.version('triton'), 'strategies': found,
               'bars': rows}
    if options.numerics:
        content['numerics'] = pretending('numerics', TRITON_INTERPRET='1')
        print('\n| in the interpreter, to eager | codes that differ | of | floats that differ '
              '| of | by at most |\n|' + '---|' * 6)
        for name, pairs in content['numerics'].items():
            cells = [sum(p[i] for p in pairs if p[0] == kind) for kind in ('codes', 'floats')
                     for i in (1, 3)]
            print(f'| {name} | {" | ".join(map(str, cells))} | {max(p[2] for p in pairs):.2g} |')
    if options.ptx and options.numerics and not args:   # what is only tried replaces no results
        RESULTS.joinpath('fusion.json').write_text(json.dumps(content, indent=1) + '\n', 'utf-8')


if __name__ == '__main__':
    main()
