"""What kind of file this is, by its first bytes; names that callers give files are not trusted."""

from __future__ import annotations

HEAD_BYTES = 64  # enough for every media type told apart here


def media_type(head: bytes) -> str:
    """Media type of a file by its first 64 bytes, `application/octet-stream` where none is recognised."""
    for magic, found in _MAGIC:
        if head.startswith(magic):
            return found
    if head[:4] == b"RIFF":
        return _RIFF_FORMS.get(head[8:12], "application/octet-stream")
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "application/octet-stream")
    if head[4:8] in (b"moov", b"mdat", b"wide"):  # QuickTime before it had brands
        return "video/quicktime"
    if head[:4] == b"\x1a\x45\xdf\xa3":  # EBML; its document type follows
        return "video/webm" if b"webm" in head else "video/matroska" if b"matroska" in head else _UNKNOWN
    return "audio/mpeg" if _is_mp3_frame(head) else _UNKNOWN


_UNKNOWN = "application/octet-stream"
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"ID3", "audio/mpeg"),
)
_RIFF_FORMS = {b"WEBP": "image/webp", b"WAVE": "audio/wav"}
# Pictures have brands of the same form (heic, avif); they are not among what is read here.
_BRANDS = {
    **dict.fromkeys((b"isom", b"iso2", b"iso3", b"iso4", b"iso5", b"iso6", b"iso7", b"iso8", b"iso9"), "video/mp4"),
    **dict.fromkeys((b"mp41", b"mp42", b"avc1", b"dash", b"M4V ", b"MSNV", b"mmp4", b"hvc1", b"av01"), "video/mp4"),
    **dict.fromkeys((b"M4A ", b"M4B "), "audio/mp4"),
    b"qt  ": "video/quicktime",
}


def _is_mp3_frame(head: bytes) -> bool:
    """Whether a file begins with the header of an MPEG layer III frame: sync, version, layer, bit rate, sample rate."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    bit_rate, sample_rate = head[2] >> 4, head[2] >> 2 & 3
    return version != 1 and layer == 1 and bit_rate not in (0, 15) and sample_rate != 3
