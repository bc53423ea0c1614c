"""What is measured beside a step's time: its parts, memory, energy, attention kernel."""

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor, nn

from fastpref.step import backends


class Clock:
    """Seconds of a step's parts, by name: on a GPU by events, which wait for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.steps: list[list[tuple[str, object, object]]] = []

    def begin(self) -> None:
        """A new step."""
        self.steps.append([])

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.steps:  # not measured: nothing is recorded either
            yield
            return
        start = self._now()
        yield
        self.steps[-1].append((name, start, self._now()))

    def medians(self) -> dict[str, float]:
        """Seconds a step spent in each part, the median over the steps."""
        if self.gpu:
            torch.cuda.synchronize()
        sums: dict[str, list[float]] = {}
        for step in self.steps:
            total: dict[str, float] = {}
            for name, start, end in step:
                spent = start.elapsed_time(end) / 1e3 if self.gpu else end - start
                total[name] = total.get(name, 0.0) + spent
            for name, spent in total.items():
                sums.setdefault(name, []).append(spent)
        return {name: median(each) for name, each in sums.items()}

    def _now(self) -> object:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class SavedBytes:
    """The most bytes that recorded graphs hold at a time: storages of saved tensors, each once,
    without parameters and buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        own = (*model.parameters(), *model.buffers())
        self.own = {t.untyped_storage().data_ptr() for t in own}
        self.held: dict[int, list[int]] = {}  # address -> [how many tensors, bytes]
        self.now = self.most = 0

    @contextmanager
    def count(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield

    def _pack(self, tensor: Tensor) -> "_Kept":
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        address = storage.data_ptr()
        if address and address not in self.own:
            entry = self.held.setdefault(address, [0, storage.nbytes()])
            entry[0] += 1
            if entry[0] == 1:
                self.now += entry[1]
                self.most = max(self.most, self.now)
            weakref.finalize(kept, self._free, address)
        return kept

    def _free(self, address: int) -> None:
        entry = self.held[address]
        entry[0] -= 1
        if not entry[0]:
            self.now -= self.held.pop(address)[1]


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Power:
    """The GPU's own energy counter (NVML), where there is one."""

    def __init__(self, device: torch.device) -> None:
        self.handle = self.nvml = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self.handle, self.nvml = pynvml.nvmlDeviceGetHandleByUUID(uuid), pynvml
        except Exception as error:  # no package, no driver, no permission: the table has a gap
            print(f"no energy is measured: {type(error).__name__} {error}")

    @property
    def driver(self) -> str:
        return str(self.nvml.nvmlSystemGetDriverVersion()) if self.nvml else ""

    def joules(self) -> float | None:
        """Since the driver was loaded."""
        if self.nvml is None:
            return None
        try:
            return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3
        except self.nvml.NVMLError:
            return None


@torch.no_grad()
def attention_kernel(call: backends.Call, name: str) -> str:
    """The kernel that computes `call` with backend `name`: the longest of its forward's trace."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    q, k, v, _ = backends.inputs(call)
    gpu = call.device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + gpu]
    with backends.serving(name):
        backends.attend(name, q, k, v)
        with profile(activities=activities) as trace:
            backends.attend(name, q, k, v)
            if gpu:
                torch.cuda.synchronize()
    if not gpu:
        return max(trace.key_averages(), key=lambda e: e.self_cpu_time_total).key
    kernels = [e for e in trace.key_averages() if e.device_type == DeviceType.CUDA]
    return max(kernels, key=lambda e: e.self_device_time_total).key if kernels else ""
