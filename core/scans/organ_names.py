"""Organ names, network and checksum inside a label map's file: a NIfTI header extension, written and read.

The extension holds the label table of Connectome Workbench, as XML with code 0. TotalSegmentator writes the same form
into its label maps.

    <CaretExtension><VolumeInformation Index="0"><LabelTable>
    <Label Key="1" Red="0.615686" Green="0.262745" Blue="0" Alpha="1"><![CDATA[liver]]></Label>
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any
from xml.etree import ElementTree

import nibabel as nib
from nibabel.nifti1 import Nifti1Extension

from core.config import check
from core.scans.nifti import EXTENSION_FLAG, READ_ERRORS, read_header, unpacked
from core.scans.organ_colours import colour_of
from core.scans.organ_words import same_name
from core.system.exits import one_line

XML_CODE = 0  # of the extension; NIfTI calls it unknown, and so do the programs that write this table
EXTENSION_BYTES = 16  # the size of an extension is a multiple of this, its own 8 bytes of size and code included
ROOT = b"<CaretExtension"
# Entries beside the names: the fingerprint of the label map's network, the checksum of the voxels that it made, and
# what tells its scan from others.
NETWORK, CHECKSUM, SCAN = "Network", "Checksum", "Scan"
MAX_ID = 255  # of an organ; label maps are uint8


def organ_names_extension(organs: Sequence[str], entries: Mapping[str, str] = MappingProxyType({})) -> Nifti1Extension:
    """Return the header extension that names organs; the same names give the same bytes.

    Args:
        organs: names by id, background first; the background is not written.
        entries: what else it holds, by name (NETWORK, CHECKSUM, SCAN); values without special characters of XML.
    """
    labels = []
    for organ, name in enumerate(organs[1:], start=1):
        red, green, blue = (f"{part:.6g}" for part in colour_of(organ))
        text = name.replace("]]>", "]]]]><![CDATA[>")  # the end mark of CDATA may not occur in it
        colour = f'Red="{red}" Green="{green}" Blue="{blue}" Alpha="1"'
        labels.append(f'<Label Key="{organ}" {colour}><![CDATA[{text}]]></Label>')
    made_by = "".join(f"<MD><Name>{name}</Name><Value>{value}</Value></MD>" for name, value in entries.items())
    made_by = made_by and f"<MetaData>{made_by}</MetaData>"
    xml = "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            '<CaretExtension><VolumeInformation Index="0"><LabelTable>',
            *labels,
            f"</LabelTable>{made_by}<VolumeType><![CDATA[Label]]></VolumeType></VolumeInformation></CaretExtension>",
        ]
    ).encode()
    # Filled up with blanks: an XML parser takes them after the end, and takes no NUL, which nibabel would fill in.
    return Nifti1Extension(XML_CODE, xml + b" " * (-(len(xml) + 8) % EXTENSION_BYTES))


def read_organ_names(path: str | Path) -> dict[int, str]:
    """Return the organ names by id, 1 or more, that a label map's file holds; empty when it holds none.

    Raises:
        FileNotFoundError, ValueError: when the file cannot be read, or its table of names is damaged.
    """
    return read_extension(Path(path), parse_table) or {}


def read_network(path: str | Path) -> str | None:
    """Return the fingerprint of the network that made a label map, or None where its file does not say.

    Raises:
        FileNotFoundError, ValueError: as `read_organ_names`.
    """
    return read_entries(path).get(NETWORK)


def read_entries(path: str | Path) -> dict[str | None, str | None]:
    """Return the entries of `organ_names_extension` in a label map's file, by name; none where it holds none.

    Raises:
        FileNotFoundError, ValueError: as `read_organ_names`.
    """

    def parse(xml: bytes) -> dict[str | None, str | None]:
        found = ElementTree.fromstring(xml).iterfind(".//MD")
        return {entry.findtext("Name"): entry.findtext("Value") for entry in found}

    return read_extension(Path(path), parse) or {}


def read_extension(path: Path, parse: Callable[[bytes], Any]) -> Any:
    """Return what `parse` makes of the XML in a label map's file, or None where it holds none.

    Raises:
        FileNotFoundError, ValueError: when the file cannot be read, or its table of names is damaged.
    """
    try:
        header, packed = read_header(path)
        with unpacked(path, packed) as stream:
            tables = [content for content in extensions_of(stream, header) if ROOT in content]
        return parse(tables[0].rstrip(b"\0 \r\n\t")) if tables else None
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: the organ names in its header are damaged XML ({error}); copy it again") from error
    except FileNotFoundError:
        raise
    except (*READ_ERRORS, struct.error) as error:
        raise ValueError(f"{path}: the organ names in its header cannot be read ({one_line(error)})") from error


def extensions_of(stream: IO[bytes], header: nib.Nifti1Header) -> list[bytes]:
    """Return the contents of a NIfTI header's extensions, whatever their codes.

    Args:
        stream: the unpacked file, at its first byte.
        header: the header of the file.

    Raises:
        struct.error: when the file ends before them.
    """
    stream.read(header.sizeof_hdr)
    left = int(header["vox_offset"]) - header.sizeof_hdr - EXTENSION_FLAG
    found = []
    if stream.read(EXTENSION_FLAG)[:1] == b"\0":
        return found
    while left >= EXTENSION_BYTES:
        size, _ = struct.unpack(f"{header.endianness}ii", stream.read(8))
        if not 8 <= size <= left:
            break
        found.append(stream.read(size - 8))
        left -= size
    return found


def parse_table(xml: bytes) -> dict[int, str]:
    """Return the names by id of a label table; the background and labels without a name are left out.

    Raises:
        ElementTree.ParseError: when it is damaged.
        ValueError: when an id is not one of a label map.
    """
    names = {}
    for label in ElementTree.fromstring(xml).iterfind("VolumeInformation[1]/LabelTable/Label"):
        organ, name = int(label.get("Key", "")), "".join(label.itertext()).strip()
        if not 0 <= organ <= MAX_ID:
            raise ValueError(f"id {organ} has a name, expected ids from 0 to {MAX_ID}")
        if organ and name:
            names[organ] = name
    return names


def check_organ_names(path: str | Path, organs: Sequence[str]) -> None:
    """Check that the names in a label map's file, if it holds any, are those of the organ list.

    Args:
        path: the label map.
        organs: names by id, background first.

    Raises:
        FileNotFoundError, ValueError: when they are not, or as `read_organ_names`.
    """
    for organ, name in sorted(read_organ_names(path).items()):
        wanted = organs[organ] if organ < len(organs) else None
        if wanted is None or not same_name(name, wanted):
            has = f"ends at id {len(organs) - 1}" if wanted is None else f"says {wanted!r}"
            raise ValueError(
                f"{path}: its header says that id {organ} is {name!r}, but the organ list {has}; "
                "give the list of this label map by --config (data.convert writes organs.yaml) or --checkpoint"
            )


def as_list(names: dict[int, str], source: str | Path) -> tuple[str, ...]:
    """Return names by id as an organ list, background first; an id without a name is called `id N`.

    Raises:
        ValueError: when they make no organ list, naming `source`.
    """
    listed = ["background", *(names.get(organ, f"id {organ}") for organ in range(1, max(names) + 1))]
    return check("organs", listed, f"{source}: the organ names in its header")
