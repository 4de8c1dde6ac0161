"""One sample as its index describes it."""

from dataclasses import dataclass

from emkd.errors import DamagedCacheError
from emkd.storage.index.columns import Rows
from emkd.storage.index.table import images_from_json
from emkd.storage.objects.digest import NEXT_STEP
from emkd.storage.record import ImageSpan

_COLUMNS = (
    "row", "id", "key", "shard", "text_count", "vision_count", "answer_count", "images", "retained_mass"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SampleInfo:
    """A sample as its index describes it. number: in this cache;  row: of its dataset"""

    number: int
    row: int
    id: str
    key: str
    shard: int
    n_text: int
    n_vision: int
    n_answer: int
    images: tuple[ImageSpan, ...]
    retained_mass: float | None

    @classmethod
    def of(cls, rows: Rows, number: int) -> "SampleInfo":
        """Return the info of the sample with this number, which must exist. Raises DamagedCacheError."""
        position = int(rows.samples[number])
        row = {name: rows[name][position].as_py() for name in _COLUMNS}
        try:
            images = images_from_json(row["images"])
        except (TypeError, ValueError) as error:
            raise DamagedCacheError(f"sample {number}: its images are not as an index has them. {NEXT_STEP}") from error
        return cls(
            number=number,
            row=row["row"],
            id=row["id"],
            key=row["key"],
            shard=row["shard"],
            n_text=row["text_count"],
            n_vision=row["vision_count"],
            n_answer=row["answer_count"],
            images=images,
            retained_mass=row["retained_mass"],
        )
