"""A protoc plugin for buf: messages, their type stubs, and gRPC stubs from grpcio-tools, placed in a Python package.

Usage: python tools/protoc_gen_py.py interceptors/gen

The input files are renamed, not the generated text: so every import is absolute inside the package, while the proto
package, and with it the names on the wire, stay as they are.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2
from google.protobuf.compiler import plugin_pb2
from grpc_tools import protoc


def main(prefix: str) -> int:
    """Answers the request on standard input."""
    request = plugin_pb2.CodeGeneratorRequest.FromString(sys.stdin.buffer.read())

    def moved(name: str) -> str:
        return name if name.startswith("google/protobuf/") else f"{prefix}/{name}"

    for file in request.proto_file:
        file.name = moved(file.name)
        file.dependency[:] = [moved(name) for name in file.dependency]
    with tempfile.TemporaryDirectory() as directory:
        descriptors, out = Path(directory, "in.binpb"), Path(directory, "out")
        out.mkdir()
        descriptors.write_bytes(descriptor_pb2.FileDescriptorSet(file=request.proto_file).SerializeToString())
        kinds = ["python", "pyi", "grpc_python", "mypy_grpc"]
        code = protoc.main(
            [
                "protoc",
                f"--descriptor_set_in={descriptors}",
                *(f"--{kind}_out={out}" for kind in kinds),
                *map(moved, request.file_to_generate),
            ]
        )
        if code:
            return int(code)
        response = plugin_pb2.CodeGeneratorResponse(supported_features=1)
        packages: set[str] = set()
        for path in sorted(out.rglob("*.py*")):
            # buf joins the names to its own `out`, which is the package already.
            name = path.relative_to(out / prefix).as_posix()
            response.file.add(name=name, content=path.read_text())
            packages.update(parent.as_posix() for parent in Path(name).parents)
        for package in sorted(packages):
            response.file.add(name=f"{package}/__init__.py".removeprefix("./"), content='"""Generated stubs."""\n')
    sys.stdout.buffer.write(response.SerializeToString())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1].strip("/")))
