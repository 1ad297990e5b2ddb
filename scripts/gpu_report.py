#!/usr/bin/env python3
"""Put what scripts/check_gpu.sh found into one JSON under docs/gpu/: device, driver, versions, commit, and every figure."""

import datetime
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from npllm.analysis import report

ROOT = Path(__file__).resolve().parents[1]


def main(work):
    """Collect the files of one run in the folder `work`; print the path of the JSON."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("*.json"))}
    facts = {"commit": said("git", "rev-parse", "HEAD"), "changed files": said("git", "status", "--porcelain").splitlines(),
             "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": report.machine_facts(),
             "driver": said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
             "tests": count(work / "tests.xml"), **found}
    folder = ROOT / "docs" / "gpu"
    folder.mkdir(exist_ok=True)
    name = (facts["machine"]["gpu"].get("name") or "gpu").lower().replace(" ", "-")
    path = folder / f"{facts['time'][:10]}-{name}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(path)


def said(*command):
    """What a command prints; why it did not run, where it did not."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"not known ({error})"


def count(path):
    """How many tests ran, failed and were skipped, and what the compiler said of the kernels."""
    suite = ElementTree.parse(path).getroot().find("testsuite")
    numbers = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in suite.iter("testcase")
              if case.find("failure") is not None or case.find("error") is not None]
    return numbers | {"failed": failed, "compiler": [x.get("value") for x in suite.iter("property")]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
