import errno
import json
import mmap
import os
import random
import resource
import signal
import time
import zlib

import pytest
import torch

from kvcache import page_file, page_file_format
from kvcache.cache import PagedKVCache
from kvcache.config import KVCacheConfig
from kvcache.page_file import PageFile
from kvcache.page_file_format import BLOCK_BYTES, CHECKSUM, COMMITTED, FRAME_BYTES, HEAD, Record
from moe_bitnet.errors import CacheFullError, ConfigError, DataError, ShapeError

PAGE_BYTES = 100
FORMAT_ID = "4/2 bits, frames 1f"
CHANGES = ("pwrite", "ftruncate", "fsync", "replace", "unlink")  # every call that changes a file


def random_pages(num_pages, page_bytes=PAGE_BYTES):
    return torch.randint(0, 256, (num_pages, page_bytes), dtype=torch.uint8)


def open_file(path, **options):
    return PageFile(path, PAGE_BYTES, FORMAT_ID, **options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pages"


@pytest.fixture
def file(path):
    with open_file(path) as file:
        yield file


def assert_holds(file, handle, pages, metadata):
    found_pages, found_metadata = file.read(handle)
    assert found_pages.dtype == torch.uint8
    assert torch.equal(found_pages, pages)
    assert found_metadata == metadata


def in_child(action):
    """Run an action in a process of its own; returns the signal that ended it, 0 if none."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - the child must never come back into pytest
            os.write(2, repr(error).encode())
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "see stderr"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def intercept(monkeypatch, number, act):
    """Call ``act(name, original, arguments)`` in the place of the call that changes a file for the n-th time."""
    counter = iter(range(10**9))

    def wrap(name, original):
        def call(*arguments, **options):
            return act(name, original, arguments) if next(counter) == number else original(*arguments, **options)

        return call

    for name in CHANGES:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))


def half_write(name, original, arguments):
    """Let half of a write through."""
    if name == "pwrite":
        descriptor, data, offset = arguments
        original(descriptor, bytes(data)[: len(data) // 2], offset)


# --- Writing and reading


@pytest.mark.parametrize("num_pages", [0, 1, 7, 33])
@pytest.mark.parametrize("page_bytes", [1, 64, 100, 4032, 4096, 5000])
def test_pages_and_metadata_come_back_as_they_were(path, num_pages, page_bytes):
    pages = random_pages(num_pages, page_bytes)
    metadata = {"length": 7, "ends": [1, 2], "name": "ä\ud800\0", "scale": 0.1, "deep": {"none": None, "is": True}}
    with PageFile(path, page_bytes, FORMAT_ID) as file:
        handle = file.write(pages, metadata)
        assert_holds(file, handle, pages, metadata)
        assert file.metadata(handle) == metadata
    with PageFile(path, page_bytes, FORMAT_ID, is_read_only=True) as file:
        assert file.handles == [handle]
        assert file.incomplete_bytes == 0
        assert_holds(file, handle, pages, metadata)


def test_pages_that_are_not_contiguous_come_back_too(file):
    pages = random_pages(2 * PAGE_BYTES)[::2, :].T.contiguous().T
    assert_holds(file, file.write(pages, {}), pages, {})


def test_what_was_read_is_the_callers_own(file):
    pages = random_pages(3)
    handle = file.write(pages, {})
    file.read(handle)[0].zero_()
    assert_holds(file, handle, pages, {})


def test_large_writes_go_to_the_system_in_chunks_of_a_mebibyte_or_more(path, monkeypatch):
    sizes = []
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: sizes.append(len(data)) or write(fd, data, offset))
    pages = random_pages(20 * 16, 2**16)
    with PageFile(path, 2**16, FORMAT_ID) as file:
        sizes.clear()
        assert_holds(file, file.write(pages, {}), pages, {})
    assert [size for size in sizes if size > 2**16] == [8 * 2**20, 8 * 2**20, 4 * 2**20]
    assert len(sizes) == 5, "and a head with its checksums, and a mark"


def test_a_write_that_the_system_cuts_short_goes_on(file, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, bytes(data)[:7], offset))
    pages = random_pages(3)
    assert_holds(file, file.write(pages, {"a": 1}), pages, {"a": 1})


def test_reading_maps_one_record_alone(file, monkeypatch):
    handles = [file.write(random_pages(1000), {}) for _ in range(4)]
    sizes = []

    class RecordingMap(mmap.mmap):
        def __new__(cls, descriptor, length, **options):
            sizes.append(length)
            return super().__new__(cls, descriptor, length, **options)

    monkeypatch.setattr(mmap, "mmap", RecordingMap)
    file.read(handles[2])
    file.metadata(handles[3])
    assert max(sizes) < 120_000
    assert sizes[-1] <= 2 * BLOCK_BYTES


def test_the_mark_is_written_after_everything_else_is_on_the_disk(file, monkeypatch):
    calls = []
    write, sync = os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: calls.append(bytes(data[:8])) or write(fd, data, at))
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or sync(fd))
    file.write(random_pages(2), {})
    assert calls[0] == HEAD
    assert calls[2:] == ["fsync", COMMITTED, "fsync"]


@pytest.mark.parametrize(
    "metadata",
    [{"a": float("nan")}, {"a": (1, 2)}, {1: "a"}, {"a": {1}}, {"a": b"b"}, [1], None, {"a": 10**5000}],
    ids=["nan", "tuple", "number as key", "set", "bytes", "list", "none", "number too long"],
)
def test_metadata_that_json_would_change_is_refused(file, metadata):
    with pytest.raises(DataError, match="JSON"):
        file.write(random_pages(1), metadata)
    assert file.handles == []


def test_metadata_that_is_too_long_or_deep_is_refused(file, monkeypatch):
    monkeypatch.setattr(page_file_format, "MAX_METADATA_BYTES", 100)
    with pytest.raises(DataError, match="has 110 bytes; at most 100"):
        file.write(random_pages(1), {"a": "x" * 101})
    deep = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(DataError, match="not JSON"):
        file.write(random_pages(1), deep)


@pytest.mark.parametrize(
    "pages",
    [torch.zeros(2, PAGE_BYTES), torch.zeros(PAGE_BYTES, dtype=torch.uint8), random_pages(2, PAGE_BYTES + 1)],
    ids=["float", "one dimension", "another page size"],
)
def test_pages_of_another_shape_are_refused(file, pages):
    with pytest.raises(ShapeError, match=r"pass torch.uint8 \[num_pages, 100\]"):
        file.write(pages, {})


def test_an_unknown_handle_is_an_error_that_names_it(file):
    for call in (file.read, file.metadata, file.drop):
        with pytest.raises(DataError, match="no record 'there'; it holds 0"):
            call("there")


def test_a_closed_file_says_so(path):
    file = open_file(path)
    handle = file.write(random_pages(1), {})
    file.close()
    file.close()
    for call in (lambda: file.read(handle), lambda: file.write(random_pages(1), {}), lambda: file.drop(handle)):
        with pytest.raises(DataError, match=r"is closed. Open it again"):
            call()


def test_the_file_is_for_its_owner_alone(path, file):
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_sequence_of_a_cache_moves_through_a_file_to_another_cache(path):
    config = KVCacheConfig(num_layers=2, num_kv_heads=2, head_dim=16, num_window_tokens=64)
    first, second = (PagedKVCache(config, 2**22) for _ in range(2))
    sequence_id = first.new_sequence()
    for layer_index in range(2):
        first.extend(layer_index, [sequence_id], torch.randn(300, 4, 16), *torch.randn(2, 300, 2, 16))
    with PageFile(path, config.page_bytes, "one cache") as file:
        handle = first.spill(sequence_id, file)
    with PageFile(path, config.page_bytes, "one cache") as file:
        again = second.spill(second.restore(handle, file), file)
        assert_holds(file, again, *file.read(handle))
        assert file.metadata(handle)["length"] == 300


# --- Opening


def change_header(path, place, data, has_checksum=True):
    header = bytearray(path.read_bytes())
    header[place : place + len(data)] = data
    if has_checksum:
        end = BLOCK_BYTES - CHECKSUM.size
        header[end:BLOCK_BYTES] = CHECKSUM.pack(zlib.crc32(header[:end]))
    path.write_bytes(header)


def test_a_file_of_another_kind_version_or_format_is_refused(path):
    open_file(path).close()
    with pytest.raises(DataError, match=r"holds pages of format '4/2 bits, frames 1f', not 'other'. Use"):
        PageFile(path, PAGE_BYTES, "other")
    with pytest.raises(DataError, match=r"holds pages of 100 bytes, not 101. Use"):
        PageFile(path, PAGE_BYTES + 1, FORMAT_ID)
    change_header(path, 8, b"\2")
    with pytest.raises(DataError, match="has version 2 of the format; this program knows 1"):
        open_file(path)
    change_header(path, 8, b"\1")
    open_file(path).close()
    change_header(path, 0, b"SQLite f")
    with pytest.raises(DataError, match="not a page file: it starts with b'SQLite f'"):
        open_file(path)


@pytest.mark.parametrize("place", [12, 16, 24, 30, 1000, BLOCK_BYTES - 1])
def test_a_flipped_bit_in_the_header_is_found(path, place):
    open_file(path).close()
    change_header(path, place, bytes([path.read_bytes()[place] ^ 4]), has_checksum=False)
    with pytest.raises(DataError, match="has a damaged header"):
        open_file(path)


def test_a_short_file_of_something_else_is_left_alone(path):
    path.write_bytes(b"notes")
    with pytest.raises(DataError, match="is not a page file"):
        open_file(path)
    assert path.read_bytes() == b"notes"


@pytest.mark.parametrize("num_bytes", [0, 3, 20, 4095])
def test_a_header_that_was_not_finished_is_written_again(path, num_bytes):
    open_file(path).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:num_bytes])
    with pytest.raises(DataError, match=r"is not a page file|fewer than its header"):
        open_file(path, is_read_only=True)
    open_file(path).close()
    assert path.read_bytes() == whole


def test_what_cannot_be_opened_is_an_error(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        open_file(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        open_file(tmp_path / "missing", is_read_only=True)
    with pytest.raises(DataError, match="No such file"):
        open_file(tmp_path / "missing" / "pages")


@pytest.mark.parametrize(("page_bytes", "format_id"), [(0, "a"), (-1, "a"), (2**60, "a"), (1, ""), (1, "a" * 1025)])
def test_impossible_settings_are_refused(path, page_bytes, format_id):
    with pytest.raises(ConfigError, match="page file: "):
        PageFile(path, page_bytes, format_id)
    assert not path.exists()


def test_a_second_writer_is_refused_in_this_process_and_in_another(path, file):
    def assert_refused():
        for is_read_only in (False, True):
            with pytest.raises(DataError, match="is in use"):
                open_file(path, is_read_only=is_read_only)

    assert_refused()
    assert in_child(assert_refused) == 0
    file.close()
    open_file(path).close()


def test_many_may_read_while_nobody_writes(path):
    with open_file(path) as file:
        handle = file.write(random_pages(1), {})
    with open_file(path, is_read_only=True) as one, open_file(path, is_read_only=True) as two:
        assert torch.equal(one.read(handle)[0], two.read(handle)[0])
        with pytest.raises(DataError, match="is in use"):
            open_file(path)
        for change in (lambda: one.write(random_pages(1), {}), lambda: one.drop(handle), one.compact):
            with pytest.raises(DataError, match="open for reading only"):
                change()


def test_the_lock_holds_after_the_file_was_compacted(path, file):
    handles = [file.write(random_pages(1), {}) for _ in range(2)]
    file.drop(handles[0])
    file.compact()
    with pytest.raises(DataError, match="is in use"):
        open_file(path)


# --- Damage


def flip(path, place, bit):
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.fixture
def three(path):
    """A closed file of three records; returns their handles, pages and where they lie."""
    pages = [random_pages(3) for _ in range(3)]
    with open_file(path) as file:
        handles = [file.write(page, {"number": number}) for number, page in enumerate(pages)]
        return handles, pages, [file._records[handle] for handle in handles]


def test_a_flipped_bit_in_metadata_checksums_or_pages_is_found_and_named(path, three):
    handles, pages, (_, record, _) = three
    areas = {
        "the metadata": range(record.metadata_offset, record.table_offset),
        "the page checksums": range(record.table_offset, record.table_offset + 12),
        **{f"page {i}": range(record.pages_offset + 100 * i, record.pages_offset + 100 * (i + 1)) for i in range(3)},
    }
    for name, places in areas.items():
        for place in places:
            flip(path, place, place % 8)
            with open_file(path, is_read_only=True) as file:
                with pytest.raises(DataError, match=f"record {handles[1]} at byte {record.offset} is damaged: {name} "):
                    file.read(handles[1])
                assert_holds(file, handles[0], pages[0], {"number": 0})
                assert_holds(file, handles[2], pages[2], {"number": 2})
            flip(path, place, place % 8)
    with open_file(path) as file:
        assert_holds(file, handles[1], pages[1], {"number": 1})


@pytest.mark.parametrize("index", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("part", ["offset", "mark_offset"])
def test_a_flipped_bit_in_a_head_or_mark_is_found_and_never_taken_for_an_unfinished_record(path, three, index, part):
    record = three[2][index]
    size = path.stat().st_size
    for place in range(getattr(record, part), getattr(record, part) + FRAME_BYTES):
        flip(path, place, place % 8)
        with pytest.raises(DataError, match=f"record .*at byte {record.offset} is damaged"):
            open_file(path)
        flip(path, place, place % 8)
    assert path.stat().st_size == size
    open_file(path).close()


def test_sizes_are_checked_before_anything_is_allocated(path, three):
    """A head with the right checksum and impossible numbers counts as unfinished, and what follows shows the damage."""
    handles, _, records = three
    huge = Record(records[2].end, PAGE_BYTES, b"12345678", 2**60, 2**60, 0, 0).frame(HEAD)
    with path.open("ab") as file:
        file.write(huge)
    with open_file(path) as file:
        assert file.incomplete_bytes == FRAME_BYTES
        assert file.handles == handles
    with path.open("r+b") as file:
        file.seek(records[1].offset)
        file.write(huge)
    with pytest.raises(DataError, match=f"the record at byte {records[1].offset} is damaged"):
        open_file(path)


def test_metadata_that_is_no_object_is_damage_even_with_the_right_checksum(path, file, monkeypatch):
    monkeypatch.setattr(page_file, "encode_metadata", lambda metadata: json.dumps(metadata).encode())
    handle = file.write(random_pages(1), [1, 2])
    with pytest.raises(DataError, match="the metadata is not a JSON object"):
        file.read(handle)


def test_a_file_that_was_cut_short_behind_our_back_is_an_error(path, file):
    handle = file.write(random_pages(100), {})
    os.truncate(path, BLOCK_BYTES * 2)
    with pytest.raises(DataError, match=r"has 8192 bytes, \d+ were there before"):
        file.read(handle)


# --- Interruptions


def test_a_file_cut_anywhere_opens_with_its_whole_records(path, three, caplog):
    handles, pages, records = three
    whole = path.read_bytes()
    last = records[2]
    cuts = {last.offset, last.offset + 1, last.offset + 63, last.offset + 64, last.table_offset + 5, last.pages_offset}
    for cut in sorted({*cuts, last.pages_offset + 150, last.mark_offset, last.mark_offset + 32, last.end - 1}):
        path.write_bytes(whole[:cut])
        with open_file(path, is_read_only=True) as file:
            assert file.incomplete_bytes == cut - last.offset
            assert file.handles == handles[:2]
        assert path.stat().st_size == cut, "a reader leaves the file as it is"
        caplog.clear()
        with open_file(path) as file:
            assert file.incomplete_bytes == cut - last.offset
            assert path.stat().st_size == last.offset
            assert ("bytes of an unfinished record" in caplog.text) == (cut > last.offset)
            assert_holds(file, handles[1], pages[1], {"number": 1})
            assert_holds(file, file.write(pages[2], {}), pages[2], {})


def test_a_tail_that_the_disk_filled_with_zeros_is_unfinished(path, three):
    handles, _, records = three
    last = records[2]
    with path.open("r+b") as file:
        file.seek(last.pages_offset)
        file.write(bytes(last.end - last.pages_offset))
    with open_file(path) as file:
        assert file.handles == handles[:2]


def work(path, kept_path):
    """Write, drop and compact; say beside the file which records are promised after each step."""
    descriptor = os.open(kept_path, os.O_WRONLY | os.O_CREAT)

    def promise(handles):
        text = json.dumps(handles).ljust(200).encode()
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, text)

    file = open_file(path)
    handles = []
    for number in range(3):
        handles.append(file.write(PAGES_OF_WORK[number], {"number": number}))
        promise(handles)
    for number in (0, 2):  # in the middle, then at the end
        promise([handle for handle in handles if handle not in (handles[0], handles[number])])
        file.drop(handles[number])
    file.compact()
    promise([handles[1], file.write(PAGES_OF_WORK[3], {"number": 3})])
    file.compact()


PAGES_OF_WORK = [random_pages(50 + number) for number in range(4)]


@pytest.mark.parametrize("how", ["before", "half"])
def test_killed_at_any_call_the_file_keeps_what_was_promised(tmp_path, monkeypatch, how):
    for number in range(1000):
        path, kept_path = tmp_path / f"pages{number}", tmp_path / f"kept{number}"

        def die(name, original, arguments):
            if how == "half":
                half_write(name, original, arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        def child(number=number, path=path, kept_path=kept_path, die=die):
            intercept(monkeypatch, number, die)
            work(path, kept_path)

        ended_by = in_child(child)
        promised = json.loads((kept_path.exists() and kept_path.read_text()) or "[]")
        with open_file(path) as file:
            assert set(promised) <= set(file.handles)
            for handle in file.handles:
                pages, metadata = file.read(handle)
                assert torch.equal(pages, PAGES_OF_WORK[metadata["number"]])
            file.drop(file.write(random_pages(2), {}))
            assert file.compact() >= 0
        assert [found.name for found in tmp_path.glob(f".pages{number}*")] == []
        if ended_by == 0:
            break
        assert ended_by == signal.SIGKILL
    assert number > 30, "each call was tried"


def test_killed_from_outside_at_any_time_the_file_opens(path):
    pages = random_pages(3000)
    rounds = random.Random(1)
    num_records = 0
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            file = open_file(path)
            while True:
                file.write(pages, {"length": 3000})
        time.sleep(rounds.uniform(0.01, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with open_file(path) as file:
            assert len(file.handles) >= num_records
            num_records = len(file.handles)
            for handle in file.handles[-2:]:
                assert_holds(file, handle, pages, {"length": 3000})
    assert num_records > 0


# --- A disk that is full or fails


@pytest.mark.parametrize(
    ("number", "error", "expected"),
    [
        *((number, errno.ENOSPC, CacheFullError) for number in range(6)),
        (1, errno.EDQUOT, CacheFullError),
        (2, errno.EFBIG, CacheFullError),
        (3, errno.EIO, DataError),
    ],
)
def test_a_write_that_fails_leaves_the_file_as_it_was(path, file, number, error, expected):
    pages = random_pages(200)
    handle = file.write(pages, {"a": 1})
    before = path.read_bytes()

    def fail(name, original, arguments):
        half_write(name, original, arguments)
        raise OSError(error, os.strerror(error))

    with pytest.MonkeyPatch.context() as patch:
        intercept(patch, number, fail)
        with pytest.raises(expected, match=os.strerror(error)) as caught:
            file.write(random_pages(5000), {})
    assert "Drop sequences and compact" in str(caught.value) or expected is DataError
    assert path.read_bytes() == before
    assert_holds(file, handle, pages, {"a": 1})
    after = file.write(pages, {})
    file.close()
    with open_file(path) as file:
        assert file.handles == [handle, after]


def test_a_tail_that_a_failed_write_could_not_take_away_does_no_harm(path, file):
    handle = file.write(random_pages(3), {})

    def fail(*_):
        raise OSError(errno.EIO, "broken")

    with pytest.MonkeyPatch.context() as patch:
        intercept(patch, 4, lambda *_: (patch.setattr(os, "ftruncate", fail), fail()))  # after the mark
        with pytest.raises(DataError):
            file.write(random_pages(300), {})
    assert path.stat().st_size > file.used_bytes
    after = file.write(random_pages(1), {})
    file.close()
    with open_file(path) as file:
        assert file.handles == [handle, after]
        assert file.incomplete_bytes == 0


def test_a_file_that_may_not_grow_is_a_full_cache(path, file):
    pages = random_pages(100)
    handle = file.write(pages, {})

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        large = random_pages(20_000)
        with pytest.raises(CacheFullError, match=r"cannot grow \(File too large\)"):
            file.write(large, {})
        assert_holds(file, handle, pages, {})
        file.write(pages, {})

    assert in_child(child) == 0
    file.close()
    with open_file(path) as file:
        assert len(file.handles) == 2
        assert file.incomplete_bytes == 0
        assert_holds(file, file.handles[1], pages, {})


def test_ctrl_c_in_a_write_leaves_the_file_as_it_was(path, file):
    before = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        intercept(patch, 2, interrupt)
        with pytest.raises(KeyboardInterrupt):
            file.write(random_pages(3), {})
    assert path.read_bytes() == before


# --- Dropping and compacting


def test_a_dropped_record_is_gone_also_after_opening_again(path, three):
    handles, pages, _ = three
    with open_file(path) as file:
        file.drop(handles[1])
        with pytest.raises(DataError, match="no record"):
            file.read(handles[1])
    with open_file(path) as file:
        assert file.handles == [handles[0], handles[2]]
        assert_holds(file, handles[2], pages[2], {"number": 2})


def test_space_at_the_end_is_free_at_once(path, three):
    handles, _, records = three
    with open_file(path) as file:
        file.drop(handles[1])
        assert file.dropped_bytes == records[1].end - records[1].offset
        assert file.used_bytes == path.stat().st_size == records[2].end
        file.drop(handles[2])
        assert file.dropped_bytes == 0
        assert file.used_bytes == path.stat().st_size == records[0].end
        file.drop(handles[0])
        assert path.stat().st_size == BLOCK_BYTES


def test_compacting_frees_the_space_and_keeps_handles(path, three):
    handles, pages, records = three
    with open_file(path) as file:
        assert file.compact() == 0
        file.drop(handles[0])
        assert file.compact() == records[0].end - records[0].offset
        assert file.dropped_bytes == 0
        assert path.stat().st_size == file.used_bytes == records[2].offset
        added = file.write(pages[0], {})
        for index in (1, 2):
            assert_holds(file, handles[index], pages[index], {"number": index})
    with open_file(path) as file:
        assert file.handles == [handles[1], handles[2], added]
        for index in (1, 2):
            assert_holds(file, handles[index], pages[index], {"number": index})


@pytest.mark.parametrize("number", range(5))
def test_a_compaction_that_fails_leaves_the_file_as_it_was(path, three, number):
    handles, pages, _ = three
    with open_file(path) as file:
        file.drop(handles[0])
        before = path.read_bytes()

        def fail(name, original, arguments):
            half_write(name, original, arguments)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.MonkeyPatch.context() as patch:
            intercept(patch, number, fail)
            with pytest.raises(CacheFullError, match="cannot grow"):
                file.compact()
        assert path.read_bytes() == before
        assert [found.name for found in path.parent.iterdir()] == [path.name]
        assert_holds(file, handles[2], pages[2], {"number": 2})
        file.compact()
        assert_holds(file, handles[2], pages[2], {"number": 2})


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_operations_agrees_with_a_dict(path, seed):
    choices = random.Random(seed)
    expected = {}
    file = open_file(path)
    for number in range(120):
        action = choices.choice(["write", "write", "drop", "read", "compact", "reopen"])
        handle = choices.choice(list(expected)) if expected else None
        if action == "write" or handle is None:
            record = (random_pages(choices.randrange(60)), {"number": number})
            expected[file.write(*record)] = record
        elif action == "drop":
            file.drop(handle)
            del expected[handle]
        elif action == "read":
            assert_holds(file, handle, *expected[handle])
        elif action == "compact":
            file.compact()
            assert file.dropped_bytes == 0
        else:
            file.close()
            file = open_file(path)
            assert file.incomplete_bytes == 0
        assert file.handles == list(expected)
        assert file.used_bytes == path.stat().st_size
    for handle, record in expected.items():
        assert_holds(file, handle, *record)
    file.close()
