"""One GPU for all four stages: what each of them may take of it, and `bunraku plan --stage all`.

Each gets what it cannot do without, and pose what it needs to tell several people apart by masks, if it can be had. What
remains goes to the VAE until it computes whole frames, to pose until it works on as many frames at a time as suits a GPU,
then to the denoiser, which is slower by a hundredth or two where it streams its blocks, to pose again for what it would
stream, and last to the encoder, which a request needs for half a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.bundles import Bundle
    from services.vae.plan import Tiling

from runtime.budget import DoesNotFit

GIB = 1024**3
_PLENTY = 1024 * GIB


@dataclass(frozen=True)
class Share:
    """What a stage may take of the device, and what it does with it."""

    stage: str
    vram_bytes: int
    words: str
    host_bytes: int  # at most

    @property
    def environment(self) -> Mapping[str, str]:
        """Settings by which the stage keeps to it."""
        if not self.vram_bytes:
            return {}
        settings = {"BUNRAKU_VRAM": str(self.vram_bytes)}
        if self.stage == "denoiser":
            settings["BUNRAKU_MEMORY_MODE"] = "hybrid"
        elif self.stage == "vae":
            settings["BUNRAKU_MAX_CONCURRENT"] = "1"  # a clip at a time may take all that the weights leave
            settings["BUNRAKU_PRECISION"] = "balanced"  # float16, as planned, whatever the environment says
        return settings


@dataclass(frozen=True)
class Clip:
    """The longest that is to fit."""

    width: int
    height: int
    num_frames: int
    cached_branches: int = 0  # guidance branches with a step cache


def device_shares(bundle: Bundle, clip: Clip, budget: int) -> list[Share]:
    """What each stage may take of a device of which all together may take `budget` bytes.

    Raises:
        DoesNotFit: there is too little even if everything is streamed that can be.
    """
    encoder, denoiser, vae = EncoderDemand(bundle), _Denoiser(bundle, clip), _Vae(bundle, clip)
    pose = _Pose(bundle, clip)
    left = budget - encoder.least - denoiser.least
    for_pose = pose.several if _has_room(vae, left - pose.several) else pose.least
    left -= for_pose
    for_vae = min(left, vae.enough)
    try:
        vae.share(for_vae)
    except DoesNotFit as error:
        text = (
            f"of {budget / GIB:.2f} GiB the encoder needs {encoder.least / GIB:.2f}, pose {pose.least / GIB:.2f} and "
            f"the denoiser {denoiser.least / GIB:.2f}, which leaves {max(left, 0) / GIB:.2f} for the VAE: {error}"
        )
        raise DoesNotFit(text) from error
    left -= for_vae
    for_pose, left = _raised(for_pose, pose.busy, left)
    for_denoiser = min(left, denoiser.enough - denoiser.least)
    left -= for_denoiser
    for_pose, left = _raised(for_pose, pose.enough, left)
    for_encoder = min(left, encoder.enough - encoder.least)
    left -= for_encoder
    # what nobody needs for this clip is for larger ones
    return [
        encoder.share(encoder.least + for_encoder),
        pose.share(for_pose),
        denoiser.share(denoiser.least + for_denoiser + left // 2),
        vae.share(for_vae + left // 2),
    ]


class EncoderDemand:
    """What the encoder stage needs, by its bundle.

    Attributes:
        least, enough: bytes without which it cannot do, and beyond which it does no better.
    """

    def __init__(self, bundle: Bundle) -> None:
        import torch

        from runtime.bundles import configuration
        from runtime.weights import build_on_meta
        from services.encoder import image, placement, text

        self._config = configuration(bundle.component("text_encoder"), text.PRESETS, text.TextEncoderConfig)
        pictures = None
        if "image_encoder" in bundle.components:
            config = configuration(bundle.component("image_encoder"), image.PRESETS, image.ImageEncoderConfig)
            pictures = build_on_meta(lambda: image.ImageModel(config)).to(torch.bfloat16)
        words = build_on_meta(lambda: text.TextModel(self._config)).to(torch.bfloat16)
        self._weights = placement.weights_of(words, pictures)
        self.least = placement.least_bytes(self._weights, self._config)
        self.enough = max(self.least, placement.whole_bytes(self._weights, self._config))

    def share(self, vram_bytes: int) -> Share:
        from services.encoder.placement import plan_encoders

        plan = plan_encoders(self._weights, self._config, vram_bytes)
        return Share("encoder", vram_bytes, str(plan), plan.host_bytes)


class _Pose:
    """Several clips at a time, as the stage takes them; one person in each without masks, or several with them.

    Attributes:
        least, enough: bytes without which it cannot do, and beyond which it does no better.
        several: for masks of several people too, by the back-end that the bundle uses, and a handful of frames at a time.
        busy: the same for as many frames at a time as suits a GPU.
    """

    def __init__(self, bundle: Bundle, clip: Clip) -> None:
        from services.pose.people import COMPONENTS
        from services.pose.plan import HANDFUL, Networks, PoseMemory, least_plan, whole_plan

        self._size = clip.height, clip.width
        self.least = self.several = self.busy = self.enough = 0
        if not bundle.components.keys() >= set(COMPONENTS):
            return  # ready pose videos need no GPU
        self._memory = PoseMemory(Networks.of(bundle))
        self.least = least_plan(self._memory, *self._size).device_bytes
        backends = self._memory.networks.backends[:1]
        self.several = least_plan(self._memory, *self._size, backends, HANDFUL).device_bytes
        self.busy = least_plan(self._memory, *self._size, backends, None).device_bytes
        self.enough = whole_plan(self._memory, *self._size).device_bytes

    def share(self, vram_bytes: int) -> Share:
        from services.pose.plan import plan_pose

        if not vram_bytes:
            return Share("pose", 0, "ready pose videos only, which need no GPU", 0)
        plan = plan_pose(self._memory, *self._size, vram_bytes)
        return Share("pose", vram_bytes, str(plan), plan.host_bytes)


class _Denoiser:
    """Counted for `exact`, which needs the most."""

    def __init__(self, bundle: Bundle, clip: Clip) -> None:
        from runtime.bundles import configuration
        from services.denoiser.model import PRESETS, TransformerConfig
        from services.denoiser.placement import weights_of
        from services.denoiser.plan import animation_tokens, least_bytes, plan_memory
        from services.denoiser.weights import unloaded_transformer

        component = bundle.component("transformer")
        self._config = configuration(component, PRESETS, TransformerConfig)
        self._weights = weights_of(unloaded_transformer(self._config, quantized=bool(component.quantization)))
        self._tokens = animation_tokens(clip.height, clip.width, clip.num_frames)
        self._branches = clip.cached_branches
        self.least = least_bytes(self._weights, self._config, self._tokens, self._branches)
        whole = plan_memory(self._weights, self._config, self._tokens, None, self._branches)
        self.enough = max(self.least, whole.device_bytes)

    def share(self, vram_bytes: int) -> Share:
        from services.denoiser.plan import plan_memory

        plan = plan_memory(self._weights, self._config, self._tokens, vram_bytes, self._branches)
        return Share("denoiser", vram_bytes, plan.words(self._weights.num_blocks), plan.most_host_bytes)


def _raised(share: int, wanted: int, left: int) -> tuple[int, int]:
    """A share with what is wanted beyond it, as far as there is some left; and what is left then."""
    more = min(left, max(0, wanted - share))
    return share + more, left - more


def _has_room(vae: _Vae, vram_bytes: int) -> bool:
    try:
        vae.share(min(vram_bytes, vae.enough))
    except DoesNotFit:
        return False
    return True


class _Vae:
    """One clip at a time, in float16."""

    def __init__(self, bundle: Bundle, clip: Clip) -> None:
        import torch

        from runtime.bundles import configuration
        from services.vae.model import PRESETS, VaeConfig
        from services.vae.plan import Machine

        config = configuration(bundle.component("vae"), PRESETS, VaeConfig)
        side = config.pixels_per_latent
        self._size = -(-clip.height // side) * side, -(-clip.width // side) * side
        self._machine = Machine(config, torch.float16, "cuda", is_fused=True)
        self.enough = self._machine.fixed_bytes + max(tiling.device_bytes for tiling in self._tilings(_PLENTY))

    def _tilings(self, vram_bytes: int) -> tuple[Tiling, Tiling]:
        """For encoding and decoding."""
        from services.vae.plan import plan_tiles

        height, width = self._size
        return (
            plan_tiles(self._machine, "encode", height, width, vram_bytes),
            plan_tiles(self._machine, "decode", height, width, vram_bytes),
        )

    def share(self, vram_bytes: int) -> Share:
        encoding, decoding = self._tilings(vram_bytes)
        host = max(encoding.host_bytes, decoding.host_bytes)
        return Share("vae", vram_bytes, f"encode: {encoding}; decode: {decoding}", host)
