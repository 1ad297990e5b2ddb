"""Put what the stages found into FOLDER/report.json, and print a summary.

Runs after every stage, and when scripts/check_gpu.sh ends, however it ends.
"""

import collections
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from gpu.records import STARTED, STATUSES, Records, ending

STAGES = ("kernels", "tests", "weights", "timings", "bench", "sanitize", "rest")
SHOWN = (
    "tokens_per_second",
    "gigabytes_per_second",
    "seconds_per_token",
    "max_error",
    "seconds",
)  # figures of a line, the first that a record has


def main(folder: Path) -> int:
    """Write report.json and print the summary; return 0 where everything that ran passed."""
    report = collect(folder)
    partial = folder / "report.json.partial"
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder / "report.json")
    print("\n".join(summary(report)))
    print(folder / "report.json")
    return 0 if report["passed"] else 1


def collect(folder: Path) -> dict[str, Any]:
    """Everything that is on disk, in one dict."""
    ended = Records(folder, "stages").latest()
    stages = {name: stage(folder, name, ended.get(name)) for name in STAGES}
    machine = read_json(folder / "machine.json")
    ran = [facts for facts in stages.values() if facts["ended"] != "not run"]
    passed = (
        bool(ran)
        and all(facts["passed"] for facts in ran)
        and bool(machine.get("device", {}).get("found"))
    )
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "passed": passed,
        "commit": machine.get("commit"),
        "rehearsal": machine.get("rehearsal"),
        "machine": machine,
        "figures": read_json(folder / "figures.json"),
        "stages": stages,
    }


def stage(folder: Path, name: str, ended: dict[str, Any] | None) -> dict[str, Any]:
    """How one stage ended, its counts, what failed, and every record."""
    records = {
        key: value for key, value in Records(folder, name).latest().items() if key != "collected"
    }
    for record in records.values():
        if record["status"] == STARTED:
            record |= {"status": "failed", "why": "began, and the stage ended before it did"}
    counts = collections.Counter(record["status"] for record in records.values())
    failed = {
        key: record.get("why", "")
        for key, record in records.items()
        if record["status"] == "failed"
    }
    facts = (
        {"ended": "not run", "passed": False, "seconds": None}
        if ended is None
        else how(ended, counts)
    )
    return facts | {
        "counts": {status: counts[status] for status in STATUSES},
        "failed": failed,
        "not_run": whys(records),
        "records": list(records.values()),
    }


def how(ended: dict[str, Any], counts: collections.Counter[str]) -> dict[str, Any]:
    """What the last record of a stage says."""
    if ended["status"] == STARTED:
        return {
            "ended": "was running when this report was written",
            "passed": False,
            "seconds": None,
        }
    passed = ended["exit_code"] == 0 and counts["passed"] > 0 and counts["failed"] == 0
    return {"ended": ending(ended["exit_code"]), "passed": passed, "seconds": ended["seconds"]}


def whys(records: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Why records were skipped or not run, and how many for each reason."""
    return dict(
        collections.Counter(
            record.get("why", "")
            for record in records.values()
            if record["status"] in ("skipped", "not run")
        )
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; an empty dict where it is missing or cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def summary(report: dict[str, Any]) -> list[str]:
    """Lines for a person: the device, each stage, what failed, and the figures of the timings."""
    device = report["machine"].get("device", {})
    lines = [f"{device.get('name') or device.get('why') or 'no device'}; commit {report['commit']}"]
    for name, facts in report["stages"].items():
        counts = ", ".join(f"{n} {status}" for status, n in facts["counts"].items() if n)
        lines.append(f"{name:<8} {facts['ended']}: {counts or 'nothing recorded'}")
        lines += [
            f"    {key}: {' '.join(why.split())[:200]}"
            for key, why in list(facts["failed"].items())[:20]
        ]
    records = [one for name in ("timings", "bench") for one in report["stages"][name]["records"]]
    for record in records:
        figure = next((f"{key} {record[key]}" for key in SHOWN if key in record), "")
        lines.append(f"  {record['name']:<32} {record['status']:<8} {figure}")
    return [
        *lines,
        "everything that ran passed" if report["passed"] else "not everything that ran passed",
    ]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
