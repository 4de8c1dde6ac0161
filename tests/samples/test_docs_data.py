"""docs/data.md: its snippets run, its limits are those of the code, and its table has every reason."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emkd.errors import SampleError
from emkd.samples import Dataset
from emkd.samples.sources import parquet
from emkd.samples.sources.find import SUFFIXES
from tests import tiny
from tests.figures import ROOT, page, results

PAGE = page("docs/data.md")
VQA, CAULDRON, OPENAI = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
A, B = tiny.png(1), tiny.png(2)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(dataset: Dataset, row: int) -> list[Any]:
    return [turn.parts for turn in dataset.sample(row).turns if turn.role == "assistant"]


def test_questions_and_answers(folder):
    rows = [{"question_id": 7, "image": "a.png", "question": "what is that", "answer": "red cat"}]
    (folder / "vqa.json").write_text(json.dumps(rows))
    (folder / "a.png").write_bytes(A)
    exec(VQA, {})
    dataset = Dataset("rows.jsonl", folder)
    assert (dataset.sample(0).images, said(dataset, 0), dataset.row(0).id) == ((A,), [("red cat",)], "7")
    plain = [{"images": [A], "id": "x", "messages": [tiny.turn("user", "<image>\nwhat is that"), tiny.turn("assistant", "red cat")]}]  # fmt: skip
    assert dataset.sample(0).key == Dataset(str(tiny.write_data(folder / "plain.parquet", plain))).sample(0).key


def test_questions_and_answers_in_a_table(folder):
    (folder / "vqa.csv").write_text('question_id,image,question,answer\n7,a.png,"what, is that",red cat\n')
    (folder / "a.png").write_bytes(A)
    as_said = re.search(r"from `(csv.DictReader\(.*\))` instead", PAGE)
    exec("import csv\n" + VQA.replace('json.loads(Path("vqa.json").read_text())', as_said[1]), {})
    assert said(Dataset("rows.jsonl", folder), 0) == [("red cat",)]


def test_the_cauldron(folder):
    texts = [{"user": f"what {n}", "assistant": f"cat {n}", "source": "x"} for n in range(2)]
    table = pa.Table.from_pylist([{"images": [{"bytes": A, "path": None}, {"bytes": B, "path": None}], "texts": texts}])
    pq.write_table(table, "cauldron.parquet")
    exec(CAULDRON, {})
    dataset = Dataset("rows.parquet")
    assert dataset.sample(0).images == (A, B)
    assert said(dataset, 0) == [("cat 0",), ("cat 1",)]
    assert len(dataset.sample(0).turns[0].parts) == 3


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(B)

    def log_message(self, *_: Any) -> None:
        pass


def test_messages_of_openai(folder):
    """A data: URI is read as it is, a URL is downloaded by the snippet."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urls = ["data:image/png;base64," + base64.b64encode(A).decode(), f"http://127.0.0.1:{server.server_port}/b.png"]
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in urls]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "what"}]}, tiny.turn("assistant", "cat")]
    (folder / "openai.jsonl").write_text(json.dumps({"messages": messages}))
    try:
        with pytest.raises(SampleError, match="is a URL, and nothing is downloaded"):
            Dataset("openai.jsonl").sample(0)
        exec(OPENAI, {})
    finally:
        server.shutdown()
        server.server_close()
    assert Dataset("rows.jsonl").sample(0).images == (A, B)


def test_the_page_has_every_reason_and_every_format():
    code = "\n".join(path.read_text() for path in (ROOT / "emkd").rglob("*.py"))
    raised = set(re.findall(r'SampleError\(\s*"([a-z-]+)"', code)) | {"video", "audio", "unread-image", "unread-key", "contradictory"}  # fmt: skip
    listed = set(re.findall(r"`([a-z-]+)`", "\n".join(re.findall(r"^\| (`[a-z`, -]+) \|", PAGE, re.MULTILINE))))
    assert raised <= listed, raised - listed
    assert [s for s in SUFFIXES if s.removesuffix(".gz") not in PAGE] == []


def test_the_limits_of_row_groups():
    found, prose = results("large_row_group"), " ".join(PAGE.split())
    peaks = {way: figures["peak_mib"] for way, figures in found["ways"].items()}
    largest = max(peaks[way] for way in ("in order", "training", "jumps"))
    gigabytes = f"{found['file_bytes'] / 1e9:.1f}"
    assert f"a row group of {gigabytes} GB, a process takes up to {largest:,} MiB" in prose
    assert f"{peaks['texts']} MiB for the texts alone" in prose
    assert "not implemented for chunked array outputs" in found["ways"]["whole"]["error"]
    assert (found["piece_mib"], found["kept_mib"]) == (parquet.PIECE_BYTES >> 20, parquet.KEPT_BYTES >> 20)
    assert f"more than {parquet.PIECE_BYTES >> 20} MB" in PAGE
    assert f"{parquet.KEPT_BYTES >> 20} MB of" in PAGE
