"""
A GPU that is not there: torch.compile's code for an H100, made, compiled and run without one.

Inductor writes its code from the shapes of fake tensors, so all it needs of a GPU is the word of
one: a device that does nothing (C++, `GUARD`), the properties of an H100, and a stop where the
code would be loaded. What it wrote can be compiled to machine code, for Triton's compiler needs
no GPU either, or run on the CPU by Triton's interpreter. The patches are of torch 2.13, and stay
in a process of their own, see `pretending`.
"""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from types import SimpleNamespace

import torch

# a CUDA device that does nothing: enough for autograd on fake tensors
GUARD = '''
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Guard : impl::NoOpDeviceGuardImpl<kCUDA> {
  static Device here() { return Device(kCUDA, 0); }
  static Stream only() { return Stream(Stream::DEFAULT, here()); }
  Device exchangeDevice(Device) const override { return here(); }
  Device getDevice() const override { return here(); }
  Stream getStream(Device) const noexcept override { return only(); }
  Stream getDefaultStream(Device) const override { return only(); }
  Stream exchangeStream(Stream) const noexcept override { return only(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at {
struct Hooks : CUDAHooksInterface {
  Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
}'''
H100 = SimpleNamespace(
    name='H100', major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, gcnArchName='',
    max_threads_per_block=1024, L2_cache_size=50 << 20, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472)
graphs = []                     # what Inductor has generated, in order: a namespace each
now = SimpleNamespace(label='', launches=0)     # what is compiled, and kernels that were launched


def lacking():
    """What this machine lacks to run any of it, or ''."""
    if not torch.__version__.startswith('2.13.') or torch.version.cuda:
        return f'torch {torch.__version__}: this knows the insides of 2.13.0 for the CPU'
    if not importlib.util.find_spec('triton'):
        return 'no triton: pip install -r experiments/requirements.txt'
    return '' if shutil.which('g++') else 'no g++: install a C++ compiler'


# ------------------------------------------------------------------------------------------------
# a GPU that is not there

def build_guard(folder):
    """The path of GUARD, compiled into a folder."""
    where = importlib.util.find_spec('torch').submodule_search_locations[0]
    library = os.path.join(folder, 'guard.so')
    subprocess.run(['g++', '-x', 'c++', '-', '-std=c++20', '-shared', '-fPIC', '-o', library,
                    f'-I{where}/include', f'-L{where}/lib', '-lc10', '-ltorch_cpu',
                    f'-Wl,-rpath,{where}/lib', '-Wl,--no-as-needed'],
                   input=GUARD, text=True, check=True)
    return library


def pretend():
    """Make torch believe in an H100, for the rest of this process, which has loaded GUARD."""
    answers = dict(
        is_available=True, device_count=1, current_device=0, is_initialized=True, manual_seed=None,
        _is_compiled=True, _lazy_init=None, manual_seed_all=None, get_device_properties=H100,
        get_device_capability=(9, 0), get_device_name='H100', is_bf16_supported=True,
        set_device=None, _exchange_device=0, _maybe_exchange_device=0, synchronize=None,
        get_rng_state=torch.zeros(16, dtype=torch.uint8), set_rng_state=None)
    for name, answer in answers.items():
        # a lambda of its own each, which dynamo can tell from the others
        setattr(torch.cuda, name, eval('lambda *a, **k: answer', {'answer': answer}))
    torch.version.cuda = '13.0'
    torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice = lambda device: 0, lambda: 0
    from torch._subclasses import fake_tensor
    fake_tensor.init_gpu_context = lambda device: None
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda self: True)
    pretend.libraries = [torch.library.Library('aten', 'IMPL', key)
                         for key in ('CUDA', 'AutogradCUDA')]
    # constants that Inductor folds are folded on the CPU
    pretend.libraries[0].impl('empty.memory_format', lambda size, dtype=None, **k:
                              torch.empty(size, dtype=dtype, device='cpu'))
    pretend.libraries[0].impl('empty_strided', lambda size, stride, dtype=None, **k:
                              torch.empty_strided(size, stride, dtype=dtype, device='cpu'))
    for library in pretend.libraries:       # flash attention, as a GPU chooses
        library.impl('scaled_dot_product_attention', flash)
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    driver.set_active(SimpleNamespace(get_current_device=lambda: 0,
                                      get_current_target=lambda: GPUTarget('cuda', 90, 32)))
    import torch._inductor.config as inductor
    from torch._inductor import graph, select_algorithm
    from torch._inductor.runtime import triton_helpers
    triton_helpers.set_driver_to_gpu = lambda: None
    cache = select_algorithm.AlgorithmSelectorCache
    cache.make_precompile_fn = lambda self, *a, **k: lambda: None
    # nothing is timed: Triton wins for int8, cuBLAS for all else
    cache.do_autotuning = lambda self, name, nodes, layout, gen, key, choices, *a, **k: {
        c: i + 1e6 * (self._is_extern(c) == (name == 'int_mm')) for i, c in enumerate(choices)}
    inductor.benchmark_epilogue_fusion = inductor.shape_padding = False     # would time kernels
    inductor.use_static_triton_launcher = False     # it would keep the cubin alone
    graph.GraphLowering._compile_to_module_lines = stop


def flash(q, k, v, mask=None, p=0.0, causal=False, *, scale=None, enable_gqa=False):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, p, causal, False,
                                                              scale=scale)[0]


def stop(self, code):
    """In place of loading generated code: keep it, and run the graph operation by operation."""
    made = SimpleNamespace(label=now.label, source=code.value, graph=self, args=None)
    made.launches = re.findall(r'^\s+(?:\w+ = )?(triton_\w+\.run|extern_kernels\.\w+|'
                               r'torch\.ops\.[\w.]+)\(', code.value, re.M)
    graphs.append(made)

    def call(args):
        now.launches += len(made.launches)
        made.args = list(args)
        return self.module(*args)

    return SimpleNamespace(__file__=os.devnull, key='', call=call)


# ------------------------------------------------------------------------------------------------
# in a process of its own

# the guard comes before torch, which asks for its devices once, and patches stay in this process
CHILD = """import ctypes, json, sys
ctypes.CDLL(sys.argv[1])
from experiments import no_gpu
no_gpu.pretend()
from experiments import fusion
result = getattr(fusion, sys.argv[2])(*json.loads(sys.argv[3]))
open(sys.argv[4], 'w').write(json.dumps(result))"""


def pretending(name, *arguments, **environment):
    """The result of a function of fusion.py, called in a process that believes in a GPU."""
    environment |= {'TORCHINDUCTOR_COMPILE_THREADS': '1',
                    'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '1', 'PYTHONWARNINGS': 'ignore'}
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, 'result.json')
        command = [sys.executable, '-c', CHILD, build_guard(folder), name, json.dumps(arguments),
                   file]
        if subprocess.run(command, env={**os.environ, **environment}).returncode:
            raise SystemExit(1)                         # it has said why
        with open(file, encoding='utf-8') as f:
            return json.load(f)


# ------------------------------------------------------------------------------------------------
# what was generated: as machine code, and in the interpreter

def triton_kernels(code):
    """{name: source} of the Triton kernels in a generated wrapper."""
    made = r"(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''"
    return dict(re.findall(made, code, re.S))


def load(name, text, folder):
    """The object `name` that the text of a module makes; from a file, as Triton wants it."""
    path = os.path.join(folder, f'{name[:99]}.py')
    with open(path, 'w', encoding='utf-8') as f:
        f.write(text)
    where = importlib.util.spec_from_file_location('generated', path)
    module = importlib.util.module_from_spec(where)
    where.loader.exec_module(module)
    return getattr(module, name)


def machine_code(name, text, folder):
    """(registers, bytes spilled) on sm_90 of a kernel in Inductor's first configuration."""
    import triton
    kernel = load(name, text, folder)
    path = os.path.join(folder, 'kernel.ptx')
    with open(path, 'w', encoding='utf-8') as f:
        f.write(kernel._precompile_config(kernel.configs[0]).kernel.asm['ptx'])
    tool = os.path.join(os.path.dirname(triton.__file__), 'backends', 'nvidia', 'bin', 'ptxas')
    says = subprocess.run([tool, '-v', '--gpu-name=sm_90a', path, '-o', os.devnull],
                          capture_output=True, text=True, check=True).stderr
    return [int(re.search(pattern, says)[1])
            for pattern in (r'Used (\d+) registers', r'(\d+) bytes spill stores')]


def numpy_libdevice():
    """What kernels call of CUDA's library, for Triton's interpreter."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def lift(f):
        def call(*args):
            like = next(a for a in args if isinstance(a, tl.tensor))
            out = f(*(a.handle.data if isinstance(a, tl.tensor) else np.float32(a) for a in args))
            return tl.tensor(TensorHandle(out.astype(like.handle.data.dtype), like.handle.dtype),
                             like.type)
        return call

    names = {'nearbyint': np.rint, 'pow': np.power, 'rsqrt': lambda x: 1 / np.sqrt(x)}
    names |= {n: getattr(np, n) for n in 'copysign floor ceil sqrt exp tanh trunc'.split()}
    return SimpleNamespace(**{name: lift(f) for name, f in names.items()})


def interpreted(made, folder):
    """A generated wrapper as a function of CPU tensors, its kernels run by the interpreter."""
    def kernel(name, text, device_str=None):
        # in place of Inductor's launcher, the bare function and what is known of it
        text = re.sub(r'@triton_heuristics\.(\w+)\(', r'@captured("\1", ', text)
        for old, new in (('libdevice, ', ''), ('tl.sqrt_rn', 'libdevice.sqrt'),
                         ('triton_helpers.set_driver_to_gpu()', '')):
            text = text.replace(old, new)
        head = ('from experiments.no_gpu import captured, numpy_libdevice\n'
                'libdevice = numpy_libdevice()\n')
        kind, meta, f = load(name, head + text, folder)
        kinds = meta['triton_meta']['signature']

        def run(*args, stream=None):
            values = dict(zip((a for a, t in kinds.items() if t != 'constexpr'), args))
            flat = meta['inductor_meta']['grid_type'] == 'Grid1D'
            blocks = {'XBLOCK': 4096 if flat and kind == 'pointwise' else 64, 'YBLOCK': 64,
                      'R0_BLOCK': 256}
            fixed = {a: blocks.get(a, 1) for a, t in kinds.items() if t == 'constexpr'}
            fixed |= meta['triton_meta'].get('constants', {})
            f[tuple(-(-values.get(n, 1) // fixed.get(b, 1)) for n, b in
                    (('xnumel', 'XBLOCK'), ('ynumel', 'YBLOCK')))](**values, **fixed)
        return SimpleNamespace(run=run)

    head, body = made.source.split('async_compile = AsyncCompile()', 1)
    names = {'__name__': 'generated'}
    exec('\n'.join(line for line in head.split('\n') if 'get_raw_stream' not in line), names)
    names |= {'async_compile': SimpleNamespace(triton=kernel, wait=lambda scope: None),
              'get_raw_stream': lambda device: 0, 'empty_strided_cuda':
              lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype)}
    exec(body.split('if __name__ ==')[0], names)
    return names['call']


def captured(kind, **meta):
    """A decorator that keeps what Inductor says of a kernel."""
    return lambda f: (kind, meta, f)


def differences(f, *inputs):
    """Of each tensor that f(*inputs) returns or is given, its kind, and how many elements differ
    between eager on the CPU and the compiled graph in the interpreter, by at most what, of how
    many."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    graphs.clear()
    torch._dynamo.reset()
    with FakeTensorMode():
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device='cuda')
                 for t in inputs]
        torch.compile(f, dynamic=False)(*fakes)
    mine, theirs = ([t.clone() for t in inputs] for _ in range(2))
    torch.cuda._DeviceGuard = lambda device: nullcontext()
    with tempfile.TemporaryDirectory() as folder:
        args = [mine[next(i for i, t in enumerate(fakes) if t is a)] for a in graphs[-1].args]
        out = interpreted(graphs[-1], folder)(args)
    pairs = [*zip(mine, theirs), *zip(out, f(*theirs))]
    return [['floats' if a.is_floating_point() else 'codes', int((a != b).sum()),
             float((a.float() - b.float()).abs().max()), a.numel()]
            for a, b in pairs if a.numel() > 1]
