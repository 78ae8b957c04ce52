"""Ship the published runs that the project is calibrated on: CSV tables into one packed table.

    python -m profiles.published.runs FOLDER

reads `runs.csv` and `oom_runs.csv` of FOLDER (every row with its source) and writes
profiles/data/published_runs.csv.gz, the same bytes from the same tables.
"""

import csv
import gzip
import io
import sys
from pathlib import Path

TABLES = ("runs.csv", "oom_runs.csv")
TARGET = Path(__file__).parent.parent / "data" / "published_runs.csv.gz"


def packed(folder: Path) -> bytes:
    """Return the tables in `folder` as one, compressed; their columns must agree."""
    text = io.StringIO()
    writer, header = csv.writer(text, lineterminator="\n"), None
    for name in TABLES:
        with (folder / name).open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            found = next(rows)
            if header is None:
                header = found
                writer.writerow(header)
            if found != header:
                raise ValueError(f"{name} has columns {found}; {TABLES[0]} has {header}")
            writer.writerows(rows)
    return gzip.compress(text.getvalue().encode(), mtime=0)


if __name__ == "__main__":
    TARGET.write_bytes(packed(Path(sys.argv[1])))
