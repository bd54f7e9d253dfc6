"""`python -m bench`: run the rows, print the table, keep JSON and pictures, and write docs/performance.md."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.report import LIVE, NOTE, as_json, page, picture, table
from bench.rows import ROWS, Place, Result

HERE = Path(__file__).parent
REFLINK_SIZE = 24 << 30


def main() -> int:
    """Run what was asked for; rows that need a file system with reflinks are left out where there is none."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"rows to run (default: all of {', '.join(ROWS)})")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where images may lie (20 GiB)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiply all sizes; the targets speak of 1")
    parser.add_argument("--results", type=Path, default=HERE / "results.json", help="the JSON file that is kept")
    parser.add_argument("--pictures", type=Path, default=HERE / "pictures", help="the folder of the pictures")
    parser.add_argument("--page", type=Path, help="write the page (docs/performance.md) too")
    args = parser.parse_args()
    unknown = set(args.rows) - set(ROWS)
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder) as scratch, reflink_folder(Path(scratch)) as xfs:
        place = Place(Path(scratch), xfs, args.scale)
        results = [one for name in args.rows or ROWS if (one := run(name, place)) is not None]
    record = merged(args.results, json.loads(as_json(results, args.scale)))
    args.results.write_text(json.dumps(record, indent=1) + "\n")
    args.pictures.mkdir(exist_ok=True)
    for one in record["rows"]:
        (args.pictures / f"{one['name']}.svg").write_text(picture(one))
    if args.page:
        args.page.write_text(page(record, "../bench/pictures", f"{NOTE}\n{LIVE}"))
    print(table(record))
    return 0


def merged(kept: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Return `record` with the rows that it lacks taken from the file, if these were measured on the same machine."""
    if not kept.exists():
        return record
    old = json.loads(kept.read_text())
    if (old["machine"], old["scale"]) != (record["machine"], record["scale"]):
        return record
    rows = {one["name"]: one for one in [*old["rows"], *record["rows"]]}
    return record | {"rows": [rows[name] for name in ROWS if name in rows]}


def run(name: str, place: Place) -> Result | None:
    """Run one row in a folder of its own, which is gone afterwards."""
    function, needs_reflink = ROWS[name]
    home = place.reflink if needs_reflink else place.plain
    if home is None:
        print(f"{name}: left out: no file system with reflinks can be mounted here", file=sys.stderr)
        return None
    folder = home / name
    folder.mkdir()
    try:
        found = function(place, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ratio = "" if found.ratio is None else f", {found.ratio:.3f} of qemu-img's"
    print(f"{name}: {found.ours:.3f} s{ratio}, {found.ours_peak >> 20} MiB", file=sys.stderr)
    return found


@contextmanager
def reflink_folder(scratch: Path) -> Iterator[Path | None]:
    """Give a folder on a freshly made XFS, mounted from a file, or None where that is not allowed."""
    image, folder = scratch / "xfs.img", scratch / "xfs"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(REFLINK_SIZE)
    try:
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


if __name__ == "__main__":
    sys.exit(main())
