"""The compiled core: addresses in (0 is null), results written in place, as csrc/kernels.h says.

`cpu` and `cuda` have the same functions; `last` is the number of threads, or the stream's address.
"""

from typing import TypedDict

objectives: int  # how many csrc/objectives.h has

class BuildInfo(TypedDict):
    cpu: str  # the instruction set in use: avx512, avx2 or portable
    compiler: str
    cuda: str  # architectures, such as "sm_90"; empty without CUDA
    nvcc: str  # its version
    why_not_cuda: str

def build_info() -> BuildInfo: ...

class _Launchers:
    @staticmethod
    def add_noise(
        rows: int,
        pairs: int,
        elements: int,
        x0: int,
        x0_dtype: int,
        out: int,
        out_dtype: int,
        seed: int,
        pair_id: int,
        index: int,
        a: int,
        s: int,
        last: int,
        /,
    ) -> None: ...
    @staticmethod
    def pair_error(
        rows: int,
        pairs: int,
        pred_rows: int,
        elements: int,
        pred: int,
        ref: int,
        dtype: int,
        target: int,
        target_dtype: int,
        seed: int,
        pair_id: int,
        index: int,
        p: int,
        q: int,
        err: int,
        ref_err: int,
        workspace: int,
        last: int,
        /,
    ) -> None: ...
    @staticmethod
    def pair_loss(
        pairs: int,
        pred_rows: int,
        elements: int,
        pred: int,
        ref: int,
        dtype: int,
        target: int,
        target_dtype: int,
        seed: int,
        pair_id: int,
        index: int,
        p: int,
        q: int,
        err: int,
        ref_err: int,
        workspace: int,
        objective: int,
        hyper: int,
        gain: int,
        weight: int,
        loss: int,
        pair_loss: int,
        margin: int,
        importance: int,
        coef: int,
        last: int,
        /,
    ) -> None: ...
    @staticmethod
    def loss_epilogue(
        pairs: int,
        objective: int,
        hyper: int,
        gain: int,
        weight: int,
        err: int,
        ref_err: int,
        loss: int,
        pair_loss: int,
        margin: int,
        importance: int,
        coef: int,
        last: int,
        /,
    ) -> None: ...
    @staticmethod
    def pair_grad(
        rows: int,
        pairs: int,
        pred_rows: int,
        elements: int,
        pred: int,
        dtype: int,
        target: int,
        target_dtype: int,
        seed: int,
        pair_id: int,
        index: int,
        p: int,
        q: int,
        coef: int,
        grad: int,
        scale: float,
        grad_pred: int,
        last: int,
        /,
    ) -> None: ...
    @staticmethod
    def unit_seed(
        rows: int,
        pairs: int,
        elements: int,
        pred: int,
        dtype: int,
        target: int,
        target_dtype: int,
        seed: int,
        pair_id: int,
        index: int,
        p: int,
        q: int,
        err: int,
        workspace: int,
        scale: float,
        out: int,
        last: int,
        /,
    ) -> None: ...

class cpu(_Launchers):
    @staticmethod
    def features() -> str: ...
    @staticmethod
    def use(name: str, /) -> bool:
        """Switch to another instruction set; False where there is none such."""

class cuda(_Launchers):  # only in builds with CUDA
    @staticmethod
    def workspace_bytes(
        rows: int, pairs: int, pred_rows: int, elements: int, with_ref: bool, /
    ) -> int: ...
