"""8-bit attention by cuDNN, through nvidia-cudnn-frontend: PyTorch gives no way to it. For Hopper GPUs.

A plan is made for each pair of lengths, which takes tenths of a second the first time; the last ones are kept.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.denoiser import triton_fp8
from services.denoiser.fp8_attention import WEIGHT_SCALE, Fp8Attention, Fp8Tokens

_PLANS = 16
_SCALES = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
_Sizes = tuple[tuple[int, ...], tuple[int, ...]]


class CudnnFp8Attention(Fp8Attention):
    """On tensors of one CUDA device. cuDNN writes what it gathers as e4m3, too."""

    name = "cudnn_fp8"

    def __init__(self) -> None:
        self._cudnn: Any = importlib.import_module("cudnn")
        self._handles: dict[torch.device, Any] = {}
        self._plans: OrderedDict[tuple[torch.device, _Sizes], _Plan] = OrderedDict()

    def as_fp8(self, values: Tensor) -> Tensor:
        return triton_fp8.as_fp8(values)

    def centred(self, values: Tensor) -> Fp8Tokens:
        return triton_fp8.centred(values)

    def restored(self, gathered: Fp8Tokens, dtype: torch.dtype) -> Tensor:
        return triton_fp8.restored(gathered, dtype)

    def gathered(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        device = queries.device
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
        output = torch.empty_like(queries)
        with torch.cuda.device(device):
            handle = self._handle(device)
            plan = self._plan(handle, device, (tuple(queries.shape), tuple(keys.shape)))
            workspace = torch.empty(plan.workspace, device=device, dtype=torch.uint8)
            given = plan.tensors(queries, keys, values, output)
            self._cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
            plan.graph.execute(given, workspace, handle=handle)
        return output

    def _handle(self, device: torch.device) -> Any:
        if device not in self._handles:
            self._handles[device] = self._cudnn.create_handle()
        return self._handles[device]

    def _plan(self, handle: Any, device: torch.device, sizes: _Sizes) -> _Plan:
        key = device, sizes
        if key not in self._plans:
            self._plans[key] = _planned(self._cudnn, handle, device, sizes)
        self._plans.move_to_end(key)
        while len(self._plans) > _PLANS:
            self._plans.popitem(last=False)
        return self._plans[key]


@dataclass(frozen=True)
class _Plan:
    """A graph that is ready to run, its tensors by name, and numbers that are the same in every run."""

    graph: Any
    handles: dict[str, Any]
    scales: dict[str, Tensor]
    workspace: int  # bytes

    def tensors(self, queries: Tensor, keys: Tensor, values: Tensor, output: Tensor) -> dict[Any, Tensor]:
        given = {"q": queries, "k": keys, "v": values, "o": output, **self.scales}
        return {self.handles[name]: tensor for name, tensor in given.items()}


def _planned(cudnn: Any, handle: Any, device: torch.device, sizes: _Sizes) -> _Plan:
    fp8, single = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=fp8, intermediate_data_type=single, compute_data_type=single, handle=handle)
    shapes = {"q": sizes[0], "k": sizes[1], "v": sizes[1]}
    handles = {name: graph.tensor(name=name, **_layout(shape), data_type=fp8) for name, shape in shapes.items()}
    one = {"dim": [1] * 4, "stride": [1] * 4}
    handles |= {name: graph.tensor(name=name, **one, data_type=single) for name in _SCALES}
    output, _, *largest = graph.sdpa_fp8(
        **{name: handles[name] for name in ("q", "k", "v", *_SCALES)},
        is_inference=True,
        attn_scale=sizes[0][-1] ** -0.5,
        use_causal_mask=False,
    )
    layout = _layout(sizes[0])
    output.set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"]).set_data_type(fp8)
    for tensor in largest:  # the largest weight and output, which nobody asks for, but cuDNN writes
        tensor.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(single)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    handles |= {"o": output, "largest_weight": largest[0], "largest_output": largest[1]}
    return _Plan(graph, handles, _scales(device), max(graph.get_workspace_size(), 1))


def _layout(shape: tuple[int, ...]) -> dict[str, list[int]]:
    """cuDNN's sizes and strides [B, H, L, d] of contiguous [B, L, H, d]."""
    batch, length, heads, width = shape
    return {"dim": [batch, heads, length, width], "stride": [length * heads * width, width, heads * width, 1]}


def _scales(device: torch.device) -> dict[str, Tensor]:
    """Queries, keys and values are given without their scales; what is gathered keeps that of the values."""
    scales = dict.fromkeys(_SCALES, 1.0) | {"scale_s": WEIGHT_SCALE, "descale_s": 1 / WEIGHT_SCALE}
    largest = dict.fromkeys(("largest_weight", "largest_output"), 0.0)
    return {name: torch.full((1, 1, 1, 1), value, device=device) for name, value in (scales | largest).items()}
