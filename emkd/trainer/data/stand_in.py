"""A picture for micro-batches that have none, so that all ranks of a sharded student run the same layers."""

import io

from PIL import Image

from emkd.errors import ModelError, SampleError
from emkd.samples.encode import Encoded, Encoder
from emkd.samples.sample import ImagePart, Sample, Turn, sample_key

SIDE = 64  # pixels
GREY = (127, 127, 127)


def stand_in(encoder: Encoder) -> Encoded:
    """Return a small grey picture with a question and an answer, as a student's processor sees it.

    It goes through the student beside the samples, and has no loss. Raises ModelError if the processor refuses it.
    """
    stream = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), GREY).save(stream, "PNG")
    turns = (
        Turn(role="user", parts=(ImagePart(), "What is it?")),
        Turn(role="assistant", parts=("A grey square.",)),
    )
    images = (stream.getvalue(),)
    try:
        return encoder(Sample(row=0, id="", key=sample_key(turns, images), turns=turns, images=images))
    except SampleError as error:
        raise ModelError(
            "student.shard: the processor refuses the picture that stands in where a micro-batch has none: "
            f"{error.detail}"
        ) from error
