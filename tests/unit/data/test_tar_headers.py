"""Members of tar files of every dialect are found where tarfile finds them; damage is told with its place."""

import gzip
import io
import tarfile

import pytest

from k25_train.data.tar.headers import Member, ReadAt, TarError, scan_members
from tests.helpers.tar_shards import tar_bytes

LONG = "a folder/" * 30 + "é.jpg"


def reader(data: bytes) -> ReadAt:
    return lambda offset, count: data[offset : offset + count]


def members_of(data: bytes) -> list[Member]:
    return list(scan_members(reader(data), len(data)))


def fault_of(data: bytes) -> tuple[list[str], TarError]:
    names: list[str] = []
    with pytest.raises(TarError) as caught:
        names.extend(member.name for member in scan_members(reader(data), len(data)))
    return names, caught.value


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tar_format: int) -> None:
    names = ["a.jpg", "b/c.d.txt", "x" * 120 + "/" + "y" * 90 + ".json", "empty.txt"]
    names += [LONG] if tar_format != tarfile.USTAR_FORMAT else []
    data = tar_bytes([(name, b"z" * (700 * number)) for number, name in enumerate(names[::-1])], tar_format)

    found = members_of(data)

    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(each.name, each.offset, each.offset_data, each.size) for each in tar]
    assert [tuple(each) for each in found] == expected
    # Each can be found again from its own header on.
    for member in found:
        part = data[member.start : member.end]
        (again,) = scan_members(reader(part), len(part), is_part=True)
        assert (again.name, again.num_bytes) == (member.name, member.num_bytes)


def test_folders_links_and_devices_are_left_out() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"odd{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("a.txt"))

    assert [each.name for each in members_of(buffer.getvalue())] == ["a.txt"]


def test_sizes_of_8_gib_and_more() -> None:
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("v.mp4")
        info.size = 9 * 2**30
        header = info.tobuf(tar_format)

        (member,) = scan_members(reader(header), len(header) + info.size, is_part=True)

        assert member == Member("v.mp4", 0, len(header), info.size)


def test_a_file_cut_within_a_member() -> None:
    data = tar_bytes([("a.txt", "a"), ("b.txt", b"b" * 2000), ("c.txt", "c")])
    for end in (1024 + 100, 1024 + 512, 1024 + 512 + 1999):
        names, fault = fault_of(data[:end])
        assert names == ["a.txt"]
        assert fault.is_cut
        assert f"cut short at byte {end}" in fault.reason


def test_a_file_without_its_end_mark() -> None:
    data = tar_bytes([("a.txt", "a")])

    names, fault = fault_of(data[:1024])

    assert (names, fault.is_cut) == (["a.txt"], False)
    assert "without its end mark" in fault.reason


def test_a_damaged_header_is_no_end() -> None:
    data = bytearray(tar_bytes([("a.txt", "a"), ("b.txt", "b")]))
    data[1024 + 3] ^= 1

    names, fault = fault_of(bytes(data))

    assert names == ["a.txt"]
    assert "damaged at byte 1024" in fault.reason


def test_files_that_cannot_be_read_in_place() -> None:
    data = tar_bytes([("a.txt", "a")])
    sparse = bytearray(data)
    sparse[156:157] = b"S"
    sparse[148:156] = b" " * 8
    sparse[148:155] = b"%06o\0" % sum(sparse[:512])
    pax = tarfile.TarInfo("a.txt")
    pax.pax_headers = {"GNU.sparse.major": "1"}

    assert "compressed (gzip); decompress it" in fault_of(gzip.compress(data))[1].reason
    assert "sparse" in fault_of(bytes(sparse))[1].reason
    assert "sparse" in fault_of(pax.tobuf(tarfile.PAX_FORMAT))[1].reason
    assert "is empty" in fault_of(b"")[1].reason
    assert "is no tar file" in fault_of(b"<html>" * 200)[1].reason


def test_a_huge_extended_header_takes_no_memory() -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**40
    header = info.tobuf(tarfile.GNU_FORMAT)

    with pytest.raises(TarError, match="extended header of 1099511627776 bytes"):
        list(scan_members(reader(header), 2**41))


def test_names_that_are_no_text_can_be_written_and_shown() -> None:
    data = bytearray(tar_bytes([("caf_.txt", "a")]))
    data[3:5] = b"\xe9\x1b"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])

    (member,) = members_of(bytes(data))

    assert member.name == r"caf\xe9\x1btxt"


def test_a_size_of_thousands_of_digits_is_damage() -> None:
    info = tarfile.TarInfo("a.txt")
    info.pax_headers = {"size": "9" * 5000}

    assert "extended header is malformed" in fault_of(info.tobuf(tarfile.PAX_FORMAT))[1].reason
