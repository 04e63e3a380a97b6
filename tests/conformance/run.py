"""`make conformance`: the official runner over connectrpc's clients, with the interceptor on every client and without.

The interceptor is transparent if it makes no case fail that passes without it. `--quick` runs the suite without it only
if a case has failed with it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "v1.0.7"
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / ".conformance"
RUNNER = BUILD / "bin" / VERSION / "connectconformance"
DESCRIPTORS = BUILD / f"descriptors-{VERSION}.bin"
# A sync call can only be cancelled between two responses: the client offers nothing else.
SKIPPED = {"sync": ["**/cancel-before-close-send", "**/cancel-after-close-send"], "async": []}
MODULE = f"connectrpc.com/conformance@{VERSION}"


def main() -> int:
    if shutil.which("go") is None:
        print("the official runner is a Go program: install Go, version 1.24 or newer")
        return 1
    prepare()
    quick = "--quick" in sys.argv[1:]
    lost = 0
    for flavour in ("sync", "async"):
        broken = sorted(failures(flavour, "--with-interceptor"))
        if broken or not quick:
            broken = sorted(set(broken) - failures(flavour))
        if broken:
            # Some cases are about time: what passes alone in the same way as without the interceptor is not broken.
            print(f"{flavour}: once more: {', '.join(broken)}")
            broken = sorted(failures(flavour, "--with-interceptor", only=broken) - failures(flavour, only=broken))
        for case in broken:
            print(f"{flavour}: FAILS WITH THE INTERCEPTOR ONLY: {case}")
        lost += len(broken)
    print("every case that passes without the interceptor passes with it" if not lost else f"{lost} cases are broken")
    return 1 if lost else 0


def prepare() -> None:
    """Fetches the runner, and its messages' descriptors."""
    if not RUNNER.exists():
        environment = {**os.environ, "GOBIN": str(RUNNER.parent)}
        package = f"connectrpc.com/conformance/cmd/connectconformance@{VERSION}"
        subprocess.run(["go", "install", package], check=True, env=environment)
    if not DESCRIPTORS.exists():
        # From outside of any module, so that nothing is changed.
        found = subprocess.run(
            ["go", "mod", "download", "-json", MODULE], check=True, capture_output=True, text=True, cwd=BUILD
        )
        directory = re.search(r'"Dir": "(.*)"', found.stdout)
        assert directory is not None
        protos = Path(directory[1]) / "proto"
        compiler = Path(os.environ.get("GEN_PYTHON", ROOT / ".venv-gen" / "bin" / "python"))
        command = [str(compiler), "-m", "grpc_tools.protoc", "-I", str(protos), "--include_imports"]
        proto = "connectrpc/conformance/v1/client_compat.proto"
        subprocess.run([*command, f"--descriptor_set_out={DESCRIPTORS}", proto], check=True)


def failures(flavour: str, *options: str, only: list[str] | None = None) -> set[str]:
    """The names of the cases that fail."""
    command = [str(RUNNER), "--mode", "client", "--conf", str(HERE / "config.yaml")]
    for pattern in SKIPPED[flavour]:
        command += ["--skip", pattern]
    for case in only or []:
        command += ["--run", case]
    client = [sys.executable, str(HERE / "client.py"), "--flavour", flavour, *options, str(DESCRIPTORS)]
    done = subprocess.run([*command, "--", *client], check=False, capture_output=True, text=True, timeout=900)
    output = done.stdout + done.stderr
    total = re.search(r"Total cases: (\d+)\s+(\d+) passed, (\d+) failed", output)
    if total is None:
        print(output[-3000:])
        raise SystemExit("the runner did not finish")
    if only is None:
        label = "with the interceptor" if options else "without it"
        print(f"{flavour}, {label}: {total[1]} cases, {total[2]} passed, {total[3]} failed", flush=True)
    failed = set(re.findall(r"^FAILED: (.*?):?$", output, flags=re.MULTILINE))
    assert len(failed) == int(total[3]), output[-3000:]
    return failed


if __name__ == "__main__":
    sys.exit(main())
