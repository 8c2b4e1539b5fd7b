"""A loaded model is placed within a budget: what is on the device, what it predicts, and what comes of its file."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor

from runtime.budget import DoesNotFit
from runtime.mapped import MappedPages
from runtime.offload import FilePiece
from services.denoiser import placement, streaming
from services.denoiser.model import Block, DiffusionTransformer
from services.denoiser.placement import free_budget, place, weights_of
from services.denoiser.plan import GIB, plan_memory
from services.denoiser.precision import BALANCED, EXACT, set_precision
from services.denoiser.quantisation import block_linears, quantize_state_dict, write_quanto
from services.denoiser.weights import load_transformer
from tests.services.denoiser.tiny import SCAIL, animation_of, normal, predict_animation, prompt, transformer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DEEP = replace(SCAIL, num_layers=5)
TOKENS = 3 * 16 + 2 * 4  # of predict_animation


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = transformer(DEEP)
    modules = block_linears(model)
    path = tmp_path / "tiny_quanto_int8.safetensors"
    write_quanto(path, quantize_state_dict(model.state_dict(), modules), modules, {})
    return path


def loaded(checkpoint: Path) -> DiffusionTransformer:
    return load_transformer([checkpoint], DEEP, device=CPU, compute_dtype=torch.float32)


def budget_for(model: DiffusionTransformer, resident: int) -> int:
    """The fewest bytes with so many blocks on the device; for all of them, what is called rarely too."""
    weights = weights_of(model)
    most, least = plan_memory(weights, DEEP, TOKENS, None).device_bytes, 0
    if resident == DEEP.num_layers:
        return most
    while least < most:
        middle = (least + most) // 2
        try:
            enough = plan_memory(weights, DEEP, TOKENS, middle).resident >= resident
        except DoesNotFit:
            enough = False
        least, most = (least, middle) if enough else (middle + 1, most)
    return most


@pytest.mark.parametrize("precision", [EXACT, BALANCED])
@pytest.mark.parametrize("resident", [0, 2, 5])
def test_a_placed_model_predicts_what_one_on_the_device_does(checkpoint: Path, precision: str, resident: int) -> None:
    whole = loaded(checkpoint)
    set_precision(whole, precision)
    expected = predict_animation(whole)
    placed = place(loaded(checkpoint), CPU, budget_for(whole, resident), TOKENS, precision=precision)
    assert placed.plan.resident == resident
    for _ in range(2):
        torch.testing.assert_close(predict_animation(placed.model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", [EXACT, BALANCED])
@pytest.mark.parametrize("resident", [0, 2, 5])
def test_blocks_that_wait_in_a_folder_give_the_same_bits(
    checkpoint: Path, tmp_path: Path, precision: str, resident: int
) -> None:
    folder = tmp_path / "offload"
    folder.mkdir()
    budget = budget_for(loaded(checkpoint), resident)
    expected = predict_animation(place(loaded(checkpoint), CPU, budget, TOKENS, precision=precision).model)
    placed = place(loaded(checkpoint), CPU, budget, TOKENS, precision=precision, folder=folder)
    for _ in range(3):
        assert torch.equal(predict_animation(placed.model), expected)
    assert not list(folder.iterdir())  # the files have no names
    assert str(folder) in Path("/proc/self/maps").read_text()


def test_what_is_taken_beyond_the_budget_is_told(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = budget_for(loaded(checkpoint), 2)
    placed = place(loaded(checkpoint), CPU, budget, TOKENS)
    for taken, excess in ((budget + 7, 7), (budget, 0), (budget - 7, 0), (None, 0)):
        monkeypatch.setattr(placement, "most_bytes", lambda device, taken=taken: taken)
        assert placed.excess(CUDA) == excess
    monkeypatch.setattr(placement, "most_bytes", lambda device: 1 << 60)
    assert placed.excess(CPU) == 0
    assert place(loaded(checkpoint), CPU, None, TOKENS).excess(CUDA) == 0


@pytest.mark.parametrize("resident", [0, 2])
def test_with_a_folder_the_plan_tells_the_most_that_is_on_the_disk(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: int
) -> None:
    living: WeakSet[FilePiece] = WeakSet()
    most = [0]

    class Counted(FilePiece):
        def __init__(self, size: int, folder: Path) -> None:
            super().__init__(size, folder)
            living.add(self)
            most[0] = max(most[0], sum(len(piece.tensor) for piece in living))

    monkeypatch.setattr("runtime.streaming.FilePiece", Counted)
    weights, budget = weights_of(loaded(checkpoint)), budget_for(loaded(checkpoint), resident)
    gaps = 256 * sum(1 for _ in loaded(checkpoint).blocks.state_dict())  # behind each tensor of a piece
    plan = place(loaded(checkpoint), CPU, budget, TOKENS, folder=tmp_path).plan
    assert plan.resident == resident
    assert most[0] - gaps <= plan.disk_bytes <= most[0]
    of_host_memory = (DEEP.num_layers - resident) * weights.block + DEEP.num_layers * weights.context
    assert plan.host_bytes_with_disk == plan.host_bytes - of_host_memory + 2 * weights.block


def test_without_a_budget_everything_is_on_the_device(checkpoint: Path) -> None:
    placed = place(loaded(checkpoint), CPU, None, TOKENS, precision=BALANCED)
    assert placed.plan.is_whole
    assert not any(module._forward_pre_hooks for module in placed.model.modules())


def test_blocks_go_one_by_one_from_file_to_host_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(checkpoint)
    mapped = memory_of(model.blocks)
    of_the_file: list[int] = []
    taken = streaming._taken

    def counted(block: Block, *given: Any) -> streaming.HostBlock:
        of_the_file.append(sum(bool(memory_of(each) & mapped) for each in model.blocks))
        return taken(block, *given)

    monkeypatch.setattr(streaming, "_taken", counted)
    place(model, CPU, budget_for(loaded(checkpoint), 0), TOKENS)
    assert of_the_file == [5, 4, 3, 2, 1]
    assert not memory_of(model.blocks) & mapped


def test_pages_of_the_file_are_dropped_block_by_block(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    taken, drop = streaming._taken, MappedPages.drop

    def noted(block: Block, *given: Any) -> streaming.HostBlock:
        events.append("taken")
        return taken(block, *given)

    def dropped(pages: MappedPages) -> None:
        events.append("dropped" if pages._spans else "nothing to drop")
        drop(pages)

    monkeypatch.setattr(streaming, "_taken", noted)
    monkeypatch.setattr(MappedPages, "drop", dropped)
    place(loaded(checkpoint), CPU, budget_for(loaded(checkpoint), 0), TOKENS)
    assert events[:10] == ["taken", "dropped"] * DEEP.num_layers


def memory_of(module: torch.nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}


def test_a_budget_that_nothing_fits_into_is_refused(checkpoint: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"the budget is 0\.10 GiB"):
        place(loaded(checkpoint), CPU, GIB // 10, TOKENS)


@pytest.mark.parametrize(
    ("others", "fraction", "expected"),
    [(0, 1.0, 80), (30, 1.0, 50), (0, 0.45, 36), (60, 0.45, 20)],
)
def test_where_nobody_says_the_budget_is_what_others_leave_of_the_fraction(
    monkeypatch: pytest.MonkeyPatch, others: int, fraction: float, expected: int
) -> None:
    own = 2 * GIB  # of this process, its CUDA context too
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((80 - others) * GIB - own, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: own)
    for counted in (own, None):
        monkeypatch.setattr(placement, "process_bytes", lambda device, counted=counted: counted)
        assert free_budget(CUDA) == expected * GIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [EXACT, BALANCED])
def test_hybrid_within_a_fraction_of_a_gpu_predicts_the_same_and_keeps_to_it(checkpoint: Path, precision: str) -> None:
    """In a process of its own, as what is taken of a device is counted by process."""
    program = f"""
import torch
from pathlib import Path
from runtime.vram import Peak
from services.denoiser.placement import free_budget, place
from services.denoiser.weights import load_transformer
from tests.services.denoiser.test_placement import CPU, CUDA, DEEP, TOKENS, budget_for, predict_on

_, total = torch.cuda.mem_get_info(CUDA)
fraction = 1.5 * 1024**3 / total
torch.cuda.set_per_process_memory_fraction(fraction, CUDA)
budget = free_budget(CUDA)
assert abs(budget - fraction * total) < 2, budget

def placed(budget):
    model = load_transformer([Path({str(checkpoint)!r})], DEEP, device=CPU, compute_dtype=torch.bfloat16)
    return place(model, CUDA, budget, TOKENS, precision={precision!r})

whole = placed(None)
expected = predict_on(whole.model, CUDA)
with Peak(CUDA) as peak:
    hybrid = placed(budget)
    for _ in range(3):
        assert torch.equal(predict_on(hybrid.model, CUDA), expected)
    assert hybrid.plan.is_whole
    streamed = placed(budget_for(whole.model, 2))
    assert streamed.plan.resident == 2, streamed.plan
    for _ in range(3):
        assert torch.equal(predict_on(streamed.model, CUDA), expected)
assert peak.driver_bytes <= budget, peak.driver_bytes
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def predict_on(model: DiffusionTransformer, device: torch.device) -> Tensor:
    """What `predict_animation` does, on a device."""
    clip, embeds = animation_of(head_dim=model.config.head_dim), prompt(SCAIL)
    assert embeds.image_embeds is not None
    assert clip.pose_latents is not None
    with torch.no_grad():
        context = model.embed_context(embeds.prompt_embeds.to(device), embeds.image_embeds.to(device))
        latents = clip.model_input(normal(1, 16, 3, 8, 8)).to(device)
        pose = clip.pose_latents.to(device)
        velocity: Tensor = model(latents, torch.tensor([500]), context, clip.rope.to(device), pose)
    return velocity.cpu()
