"""The rows of data files, one module for each format, behind one interface.

source      what every format gives: rows by number, texts without images
find        which files --data names, and the name of a hub data set in the local cache
open        the source of a file, by its name
parquet     .parquet
json_rows   .json, .jsonl, .ndjson, also compressed with gzip
arrow       the .arrow files of `save_to_disk` and of the cache of `datasets`
webdataset  .tar
tables      Arrow tables as rows, for parquet and arrow
"""

from emkd.samples.sources.parquet import ParquetSource
from emkd.samples.sources.source import RawRow, Source, sampled_sha256

__all__ = ["ParquetSource", "RawRow", "Source", "sampled_sha256"]
