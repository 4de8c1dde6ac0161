"""Codes of hidden states, [n, r] int16 or int8: since format version 4, if the cache has a basis.

Each image, and each sample's text and answers, makes one frame (see `frames`). The frames of a shard follow each other
in one array of bytes, and two short arrays say how long each frame is and of how many tokens. So a sample's codes are
found and decoded without those of others, and a shard in memory takes hardly more than on disk.

    vision_codes            [bytes]   uint8
    vision_frame_bytes      [frames]  int32
    vision_frame_tokens     [frames]  int32     and the same for answer and text tokens
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emkd.errors import DamagedCacheError
from emkd.storage.arrays.frames import decode_frame, encode_frame, fits_int8
from emkd.storage.arrays.kind import ArrayKind, Arrays
from emkd.storage.arrays.layout import ArrayLayout, TokenAxis, frame_axes
from emkd.storage.manifest.codes import BasisIdentity
from emkd.storage.objects.digest import NEXT_STEP
from emkd.storage.objects.sizes import check_explained


@dataclass(frozen=True)
class CodeFrames(ArrayKind):
    """Frames of codes. groups: columns of each group of a frame"""

    codes: ArrayLayout
    n_bytes: ArrayLayout
    n_tokens: ArrayLayout
    groups: tuple[int, ...]

    @property
    def layouts(self) -> tuple[ArrayLayout, ...]:
        return (self.codes, self.n_bytes, self.n_tokens)

    def encode(self, values: NDArray[Any]) -> Arrays:
        """Return one frame, or none if there are no tokens."""
        frames = [encode_frame(values, self.groups)] if len(values) else []
        return {
            self.codes.name: np.frombuffer(b"".join(frames), np.uint8),
            self.n_bytes.name: np.array(list(map(len, frames)), np.int32),
            self.n_tokens.name: np.full(len(frames), len(values), np.int32),
        }

    def decode(self, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the codes [n, r] of the frames in the arrays, as a transpose of [r, n].

        They are int8 if no frame has a number that needs more: half of the memory to write, to keep and to send.
        """
        data = np.ascontiguousarray(arrays[self.codes.name]).data
        check_explained(self.codes.name, 2 * shape[0] * shape[1], data.nbytes)
        ends = list(accumulate(arrays[self.n_bytes.name].tolist(), initial=0))
        frames = [data[first:last] for first, last in pairwise(ends)]
        small = bool(frames) and all(fits_int8(frame, self.groups) for frame in frames)
        out, token = np.empty((shape[1], shape[0]), np.int8 if small else np.int16), 0
        for frame, n_tokens in zip(frames, arrays[self.n_tokens.name].tolist(), strict=True):
            decode_frame(self.codes.name, frame, self.groups, out[:, token : token + n_tokens])
            token += n_tokens
        if (ends[-1], token) != (data.nbytes, shape[0]):
            raise DamagedCacheError(
                f"{self.codes.name}: frames of {token} tokens in {ends[-1]} bytes; expected {shape[0]} tokens in "
                f"{data.nbytes} bytes. {NEXT_STEP}"
            )
        return out.T


def codes(axis: TokenAxis, basis: BasisIdentity) -> CodeFrames:
    """Return the kind that stores the codes of vision, answer or text tokens."""
    of_bytes, of_frames = frame_axes(axis)
    frames = ArrayLayout(
        name=f"{axis}_codes",
        axis=of_bytes,
        dtype=np.dtype(np.uint8),
        shuffle="noshuffle",
        compression="lz4",  # saves the zeros that fill the last chunk; nothing of the frames
        once_plain=True,
        attributes={"meaning": "frames of codes", "step": basis.step, "groups": list(basis.groups)},
    )
    n_bytes, n_tokens = (
        ArrayLayout(
            name=f"{axis}_frame_{what}",
            axis=of_frames,
            dtype=np.dtype(np.int32),
            attributes={"meaning": f"{what} of each frame of {axis}_codes"},
        )
        for what in ("bytes", "tokens")
    )
    return CodeFrames(frames, n_bytes, n_tokens, basis.groups)
