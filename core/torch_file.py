"""What a file of `torch.save` holds, described without building any of it, for files that come from strangers.

torch.load(weights_only=True) runs no code from a file, but it makes tensors as large as the file says, and reads past
the end of a storage that is smaller than its tensor. So the file is looked through first: the zip archive around it,
and the pickle inside, by a reader that knows only what `torch.save` writes for plain values and tensors, calls nothing
and imports nothing.
"""

import math
import os
import pickletools
import re
import struct
import zipfile
from typing import Any, BinaryIO, NamedTuple

import torch
from isal import isal_zlib

# Bounds on what is read of a file before it is trusted. A checkpoint of the default network with its optimiser has 400
# members and a pickle of 60 KB, to which 10,000 case ids add 200 KB.
MOST_DIRECTORY_BYTES = 4 * 2**20  # of the archive's list of members
MOST_PICKLE_BYTES = 4 * 2**20
# The default network with its optimiser takes 0.8 GiB, one of four times the channels 12.5.
MOST_GIB = 16
READ_BYTES = 4 * 2**20
# Of a member that is marked as a folder torch.load reads nothing, and gives whatever the memory held.
ENCRYPTED, DOS_ATTRIBUTES = 1, 0xFF

STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
REBUILD, ORDERED_DICT = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
# What files of other kinds start with.
MAGICS = (
    (b"version https://git-lfs", "it is a Git LFS pointer; fetch the file itself with git lfs pull"),
    (b"\x80", "it is a pickle, or of torch before 1.6, either of which could run code"),
    (b"\x1f\x8b", "it is packed with gzip"),
    (b"\x89HDF", "it is an HDF5 file, perhaps of Keras"),
    (b"\x93NUMPY", "it is an array of numpy"),
    (b"\x08", "it looks like an ONNX model"),
    (b"<", "it is a web page, perhaps in place of a download"),
)


class Name(NamedTuple):
    """A module and a name in it, as a file has them."""

    text: str


class Storage(NamedTuple):
    """Numbers in a member of the archive."""

    key: str
    dtype: torch.dtype
    elements: int


class TensorForm(NamedTuple):
    """What a tensor will be: its type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def describe(file: BinaryIO) -> Any:
    """What torch.load will return for an open file, each tensor as a TensorForm.

    When this returns, every number of the file belongs to exactly one tensor at most, and is really there: loading
    takes no more memory than the file has bytes.

    Raises:
        ValueError: without the file's name, when it holds anything else than `torch.save` makes of plain values and
            tensors; OSError when it cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    check_magic(file, size)
    if size > MOST_GIB * 2**30:
        raise ValueError(f"it has {size / 2**30:.1f} GiB, expected {MOST_GIB} at most")
    check_directory(file, size)
    try:
        archive = zipfile.ZipFile(file)
        members = check_members(archive, size)
        pickled = archive.read(members["data.pkl"])
        form = PickleReader({name: member.file_size for name, member in members.items()}).read(pickled)
    except (zipfile.BadZipFile, LookupError, TypeError, NotImplementedError, struct.error, EOFError) as error:
        raise ValueError("it is damaged") from error
    check_sums(archive, members)
    file.seek(0)
    return form


def check_magic(file: BinaryIO, size: int) -> None:
    """Raise a ValueError that says what the file is, unless it starts as a zip archive does."""
    start = file.read(512)
    if not start:
        raise ValueError("it is empty")
    if start.startswith(b"PK\x03\x04"):
        return
    if start[257:262] == b"ustar":
        raise ValueError("it is a tar archive, perhaps of torch before 0.1.10")
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= size - 8:
        raise ValueError("it is a safetensors file")
    for magic, what in MAGICS:
        if start.startswith(magic):
            raise ValueError(what)
    raise ValueError("it is damaged, or another kind of file")


def check_directory(file: BinaryIO, size: int) -> None:
    """Check that the archive ends with its list of members, of a sensible length, and that nothing follows it.

    So all readers of zip archives find the same members, and none is made to read a list of gigabytes.
    """
    cut = ValueError("it is cut short, or damaged; copy it once more")
    file.seek(max(0, size - 98))  # of the end record, 22 bytes, and of those of large archives before it
    tail = file.read()
    end = len(tail) - 22
    if end < 0 or tail[end : end + 4] != b"PK\x05\x06":
        raise cut
    length, offset, comment = struct.unpack("<IIH", tail[end + 12 :])
    last = size - 22
    if end >= 76 and tail[end - 20 : end - 16] == b"PK\x06\x07":  # the records of a large archive, which torch writes
        (record,) = struct.unpack("<Q", tail[end - 12 : end - 4])
        length, offset = struct.unpack("<QQ", tail[end - 36 : end - 20])
        last -= 76
        if record != last or tail[end - 76 : end - 72] != b"PK\x06\x06":
            raise cut
    elif 0xFFFFFFFF in (length, offset):
        raise cut
    if comment or offset + length != last:
        raise cut
    if length > MOST_DIRECTORY_BYTES:
        raise ValueError(f"its list of members takes {length} bytes, expected {MOST_DIRECTORY_BYTES} at most")


def check_members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members of torch's archive by their names in its one folder; none may unpack to more than it takes.

    Raises:
        ValueError: when it is another archive, or one that claims more than it has.
    """
    members, folders = {}, set()
    for member in archive.infolist():
        folder, _, name = member.filename.partition("/")
        folders.add(folder)
        if name in members:
            raise ValueError(f"it holds two members {name[:80]!r}")
        members[name] = member
    if "constants.pkl" in members or any(name.startswith("code/") for name in members):
        raise ValueError("it is a TorchScript archive, which holds code")
    if len(folders) != 1 or "data.pkl" not in members:
        raise ValueError("it is a zip archive, but not of torch.save")
    if any(member.compress_type or member.compress_size != member.file_size for member in members.values()):
        raise ValueError("it is a compressed archive, which torch.save does not write")
    if any(member.flag_bits & ENCRYPTED or member.external_attr & DOS_ATTRIBUTES for member in members.values()):
        raise ValueError("it is damaged: a member is marked as encrypted or as a folder")
    if sum(member.file_size for member in members.values()) > size:
        raise ValueError("its members claim more bytes than the file has")
    pickled = members["data.pkl"].file_size
    if pickled > MOST_PICKLE_BYTES:
        raise ValueError(f"its data.pkl has {pickled} bytes, expected {MOST_PICKLE_BYTES} at most")
    return members


def check_sums(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> None:
    """Check every member against its checksum, which torch.load does not look at.

    Raises:
        ValueError: when a single bit of the file has changed.
    """
    for name, member in members.items():
        start = data_offset(archive.fp, member)
        archive.fp.seek(start)
        left, found = member.file_size, 0
        while left:
            piece = archive.fp.read(min(left, READ_BYTES))
            if not piece:
                raise ValueError("it is cut short, or damaged; copy it once more")
            found = isal_zlib.crc32(piece, found)
            left -= len(piece)
        if found != member.CRC:
            raise ValueError(f"it is damaged: the checksum of {name[:80]} is wrong; copy it once more")


def data_offset(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes start: behind its own header, whose name and extra field have lengths of their own.

    Raises:
        ValueError: when there is no header.
    """
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError("it is damaged; copy it once more")
    return member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


class PickleReader:
    """Reads the pickle of `torch.save` into plain values and TensorForms; anything else is refused.

    Args:
        sizes: of the archive's members in bytes, by name.
    """

    def __init__(self, sizes: dict[str, int]):
        self.sizes = sizes
        self.used: set[str] = set()  # keys of storages that have their tensor
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the open marks
        self.memo: dict[int, Any] = {}

    def read(self, pickled: bytes) -> Any:
        """The value of a pickle.

        Raises:
            ValueError, LookupError, TypeError: when it is none, or not of the kind that `torch.save` writes.
        """
        for opcode, argument, _ in pickletools.genops(pickled):
            name = opcode.name
            if name == "STOP":
                break
            if name in VALUES:
                self.stack.append(argument)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name.endswith("BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name.endswith("BINGET"):
                self.stack.append(self.memo[argument])
            elif name == "GLOBAL":
                self.stack.append(self.name(argument))
            elif name in ("PROTO", "MARK", "EMPTY_DICT", "EMPTY_LIST"):
                self.open(name, argument)
            elif name.startswith("TUPLE"):
                self.make_tuple(name)
            elif name in ("SETITEM", "SETITEMS", "APPEND", "APPENDS"):
                self.fill(name)
            elif name == "BINPERSID":
                self.stack.append(self.storage(self.stack.pop()))
            elif name == "REDUCE":
                arguments = self.stack.pop()
                self.stack.append(self.call(self.stack.pop(), arguments))
            elif name == "BUILD":
                self.build(self.stack.pop())
            else:
                raise ValueError(f"its pickle has the instruction {name}, which torch.save does not write")
        return self.stack[-1]

    def name(self, text: str) -> Name:
        """A name of the few that `torch.save` writes."""
        if text not in (REBUILD, ORDERED_DICT, *STORAGES):
            name = ".".join(text.split(" "))[:80]
            raise ValueError(f"it asks for {name!a}, which was not run; do not trust it unless you know why it does")
        return Name(text)

    def open(self, name: str, argument: int) -> None:
        """Start a dict, a list or what a mark holds; check the protocol."""
        if name == "PROTO" and argument != 2:
            raise ValueError(f"its pickle is of protocol {argument}, expected 2")
        if name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name != "PROTO":
            self.stack.append({} if name == "EMPTY_DICT" else [])

    def since_mark(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def make_tuple(self, name: str) -> None:
        """Tie the last items into a tuple: TUPLE1 to TUPLE3, or all since the mark."""
        items = self.since_mark() if name == "TUPLE" else [self.stack.pop() for _ in range(int(name[5:]))][::-1]
        self.stack.append(tuple(items))

    def fill(self, name: str) -> None:
        """Put the last items into the dict or list below them."""
        count = {"SETITEM": 2, "APPEND": 1}.get(name)
        items = [self.stack.pop() for _ in range(count)][::-1] if count else self.since_mark()
        target = self.stack[-1]
        if not isinstance(target, dict if name.startswith("SETITEM") else list):
            raise TypeError(f"{name} on a {type(target).__name__}")
        if isinstance(target, list):
            target.extend(items)
        else:
            if not all(isinstance(key, str | int) for key in items[::2]):
                raise TypeError("a key that is neither text nor a number")
            target.update(zip(items[::2], items[1::2], strict=True))

    def storage(self, identity: Any) -> Storage:
        """The numbers of a tensor, which must be there, all of them and no more."""
        what, kind, key, location, elements = identity
        if what != "storage" or not isinstance(kind, Name) or kind.text not in STORAGES:
            raise TypeError("no storage")
        if not (isinstance(key, str) and re.fullmatch(r"[0-9]{1,9}", key) and isinstance(location, str)):
            raise TypeError("no name of a storage")
        dtype = STORAGES[kind.text]
        there = self.sizes[f"data/{key}"]
        if type(elements) is not int or elements * dtype.itemsize != there:
            raise ValueError(f"its storage {key} claims {str(elements)[:40]} numbers of {dtype}, but has {there} bytes")
        return Storage(key, dtype, elements)

    def call(self, function: Any, arguments: Any) -> dict | TensorForm:
        """What one of the two functions that `torch.save` names would give."""
        if function == Name(ORDERED_DICT) and arguments == ():
            return {}
        if function != Name(REBUILD):
            raise TypeError("a call of something else")
        storage, offset, shape, strides, needs_gradient, hooks = arguments
        if not isinstance(storage, Storage) or hooks != {} or not isinstance(needs_gradient, bool):
            raise TypeError("no tensor")
        if storage.key in self.used:
            raise ValueError(f"two of its tensors share the storage {storage.key}")
        self.used.add(storage.key)
        if type(offset) is not int or offset != 0 or not is_dense(shape, strides, storage.elements):
            raise ValueError(
                f"a tensor of shape {str(shape)[:60]} and strides {str(strides)[:60]} does not fit its storage of "
                f"{storage.elements} numbers"
            )
        return TensorForm(storage.dtype, shape)

    def build(self, state: Any) -> None:
        """The notes that a network's state dict carries; they are not needed, anything else would be an attack."""
        if not isinstance(self.stack[-1], dict) or not isinstance(state, dict) or list(state) != ["_metadata"]:
            raise TypeError("a state that is not a state dict's")


def is_dense(shape: Any, strides: Any, elements: int) -> bool:
    """Whether a tensor has each of its storage's numbers exactly once, in whatever order of its axes."""
    for values in (shape, strides):
        if not isinstance(values, tuple) or not all(type(value) is int and value >= 0 for value in values):
            return False
    if len(shape) != len(strides) or math.prod(shape) != elements:
        return False
    expected = 1
    for stride, n in sorted(zip(strides, shape, strict=True)):
        if n > 1 and stride != expected:
            return False
        expected *= n
    return True
