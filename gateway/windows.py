"""The windows of a long clip: how many frames the denoiser makes at a time, and which of them are new.

Pure arithmetic on frame counts; a window starts with frames of the one before it (the overlap), which it is given and
does not return.
"""

from __future__ import annotations

from dataclasses import dataclass

_FRAMES_PER_LATENT = 4


@dataclass(frozen=True)
class Window:
    """One window, in frames of the finished clip."""

    start_frame: int  # first frame, overlap included; the driving video is cut here
    num_frames: int  # frames to generate, overlap included, 4n+1; may reach past the end of the clip
    overlap_frames: int  # leading frames known from the window before, 0 in the first
    kept_frames: int  # new frames that go into the clip: those right after the overlap

    @property
    def kept(self) -> slice:
        """The new frames, as a slice of this window's frames."""
        return slice(self.overlap_frames, self.overlap_frames + self.kept_frames)


def plan_windows(num_frames: int, window_frames: int = 81, overlap_frames: int = 1) -> list[Window]:
    """Splits a clip into windows: the first as long as allowed, each next with up to window - overlap new frames.

    A last window that is shorter is rounded up to 4n+1 frames and the surplus is not kept, so its driving video may
    have to be continued past its end (by repeating the last frame).

    Args:
        num_frames: frames of the clip, at least 1.
        window_frames: longest window, 4n+1.
        overlap_frames: frames a window takes over from the one before, 4n+1 and below window_frames.

    Raises:
        ValueError: an argument is outside these bounds.

    Source: the sliding windows of Wan2GP's SCAIL (deepbeepmeep/Wan2GP 8681e9f).
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    for name, value in (("window_frames", window_frames), ("overlap_frames", overlap_frames)):
        if value < 1 or value != _rounded_up(value):
            raise ValueError(f"{name} must be 4n + 1, got {value}")
    if overlap_frames >= window_frames:
        raise ValueError(f"overlap_frames must be below window_frames = {window_frames}, got {overlap_frames}")
    kept = min(num_frames, window_frames)
    windows = [Window(0, _rounded_up(kept), 0, kept)]
    done = kept
    while done < num_frames:
        kept = min(num_frames - done, window_frames - overlap_frames)
        windows.append(Window(done - overlap_frames, _rounded_up(overlap_frames + kept), overlap_frames, kept))
        done += kept
    return windows


def _rounded_up(frames: int) -> int:
    """The next 4n+1: the first latent frame holds one picture, every further one four."""
    return -(-(frames - 1) // _FRAMES_PER_LATENT) * _FRAMES_PER_LATENT + 1
