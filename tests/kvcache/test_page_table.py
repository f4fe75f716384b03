import pytest

from kvcache.page_table import NO_PAGE, PageTable, num_pages_of


def filled_table(num_tokens=500, num_sink_pages=1, num_window_tokens=128, num_layers=3):
    """A table between two steps: page i has exact page 100 + i, or packed page 200 + i."""
    table = PageTable(num_layers, num_sink_pages, num_window_tokens)
    num_pages = num_pages_of(num_tokens)
    table.reserve(num_pages)
    table.exact_ids[:num_pages] = range(100, 100 + num_pages)
    end = min(table.sealed_end_at(num_tokens), num_pages)
    table.exact_ids[num_sink_pages:end] = NO_PAGE
    table.packed_ids[num_sink_pages:end] = range(200 + num_sink_pages, 200 + end)
    table.sealed_ends = [end] * num_layers
    table.length = table.planned_length = num_tokens
    table.settled_end = table.planned_sealed_end = end
    table.check_integrity()
    return table


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (64, 1), (65, 2), (500, 8)])
def test_the_last_page_need_not_be_full(num_tokens, num_pages):
    assert num_pages_of(num_tokens) == num_pages


@pytest.mark.parametrize(("num_sinks", "num_window"), [(0, 0), (1, 128), (2, 1), (1, 100), (3, 63)])
def test_a_page_is_sealed_when_the_window_has_passed_it(num_sinks, num_window):
    table = PageTable(1, num_sinks, num_window)
    for num_tokens in range(700):
        sealed = [page for page in range(num_sinks, 12) if 64 * (page + 1) + num_window <= num_tokens]
        assert table.sealed_end_at(num_tokens) == num_sinks + len(sealed)


def test_only_cuts_that_leave_packed_pages_whole_are_allowed():
    table = filled_table()  # pages 1 to 4 are packed
    allowed = {num_tokens for num_tokens in range(501) if table.can_be_cut_to(num_tokens)}
    assert allowed == {*range(65), 128, 192, 256, *range(320, 501)}


@pytest.mark.parametrize(
    ("num_tokens", "exact_ids", "packed_ids"),
    [
        (500, [], []),
        (321, [106, 107], []),
        (320, [105, 106, 107], []),
        (192, [105, 106, 107], [203, 204]),
        (64, [105, 106, 107], [201, 202, 203, 204]),
        (3, [105, 106, 107], [201, 202, 203, 204]),
        (0, [100, 105, 106, 107], [201, 202, 203, 204]),
    ],
)
def test_a_cut_gives_back_the_pages_behind_it(num_tokens, exact_ids, packed_ids):
    table = filled_table()
    before = table.owned_exact_ids(), table.owned_packed_ids()
    assert table.cut(num_tokens) == (exact_ids, packed_ids)
    table.check_integrity()
    assert table.length == num_tokens
    assert (table.owned_exact_ids() + exact_ids, table.owned_packed_ids() + packed_ids) == before


def begin_step(table, num_tokens, sealed_end):
    table.reserve(num_pages_of(num_tokens))
    for page in range(num_pages_of(table.length), num_pages_of(num_tokens)):
        table.exact_ids[page] = 100 + page
    for page in range(table.settled_end, sealed_end):
        table.packed_ids[page] = 200 + page
    table.planned_length, table.planned_sealed_end = num_tokens, sealed_end


def test_a_step_is_over_with_its_last_layer_in_any_order():
    table = filled_table()
    begin_step(table, 520, 6)
    for layer_index, is_last in ((2, False), (0, False), (1, True)):
        table.sealed_ends[layer_index] = 6
        table.check_integrity()
        assert table.finish_layer(layer_index) == is_last
        assert table.is_between_layers == (not is_last)
        assert table.length == (520 if is_last else 500)
    assert table.settle() == ([105], [205])
    assert table.settle() == ([], [])
    table.check_integrity()


def test_cutting_an_unfinished_step_brings_every_layer_back():
    table = filled_table()
    begin_step(table, 700, 8)
    table.sealed_ends[0] = 8
    table.finish_layer(0)
    exact_ids, packed_ids = table.cut(500)
    # page 7 was partly full: it goes on as an exact page; pages 5 and 6 are packed in layer 0 alone
    assert exact_ids == [108, 109, 110]
    assert packed_ids == [207]
    assert table.sealed_ends == [7, 5, 5]
    assert table.settle() == ([], [])
    assert not table.is_between_layers
    table.check_integrity()
    assert not table.can_be_cut_to(400)
    assert table.can_be_cut_to(448)


def test_a_copy_is_independent():
    table = filled_table()
    other = table.copy()
    other.check_integrity()
    other.cut(0)
    table.check_integrity()
    assert table.length == 500
    assert table.owned_packed_ids() == [201, 202, 203, 204]


def test_missing_and_doubled_pages_are_found():
    for page, array, value in ((0, "exact_ids", NO_PAGE), (2, "packed_ids", NO_PAGE), (7, "exact_ids", 106)):
        table = filled_table()
        getattr(table, array)[page] = value
        with pytest.raises(AssertionError):
            table.check_integrity()
