import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from idl.recurrence.timeline import Timeline

LENGTHS = [5, 3, 3, 1]
RAGGED = Timeline((4, 3, 3, 1, 1))
EVEN = Timeline((2, 2, 2))


def values(timeline):
    """Each row is ``10 * sequence + time``."""
    return torch.cat([torch.arange(size) * 10 + time for time, size in enumerate(timeline.sizes)])[:, None].double()


def test_the_order_of_rows_is_that_of_torch():
    padded = torch.arange(4)[:, None, None] * 10.0 + torch.arange(5)[None, :, None]
    packed = pack_padded_sequence(padded, LENGTHS, batch_first=True)
    assert tuple(packed.batch_sizes.tolist()) == RAGGED.sizes
    assert torch.equal(packed.data.double(), values(RAGGED))
    assert RAGGED.rows == sum(LENGTHS)
    assert RAGGED.batch == 4
    assert RAGGED.starts == (0, 4, 7, 10, 11, 12)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("timeline", [RAGGED, EVEN, Timeline((3,)), Timeline((4, 1))], ids=str)
def test_after_each_value_comes_that_of_the_next_time_of_its_sequence(timeline, backwards):
    timeline = Timeline(timeline.sizes, backwards)
    rows = values(timeline)
    last = -torch.arange(1, timeline.batch + 1)[:, None].double()
    lengths = [sum(size > i for size in timeline.sizes) for i in range(timeline.batch)]
    for row, after in zip(rows[:, 0].tolist(), timeline.after(rows, last)[:, 0].tolist(), strict=True):
        sequence, time = divmod(int(row), 10)
        ends = time == (0 if backwards else lengths[sequence] - 1)
        assert after == (-1 - sequence if ends else row + (-1 if backwards else 1))


def test_reading_order_turns_around():
    assert list(RAGGED.order) == [0, 1, 2, 3, 4]
    assert list(RAGGED.reversed().order) == [4, 3, 2, 1, 0]
    assert RAGGED.reversed().reversed() == RAGGED


def test_a_widened_timeline_has_as_many_rows_more():
    assert RAGGED.widened(3) == Timeline((12, 9, 9, 3, 3))
    assert RAGGED.reversed().widened(2).backwards


def test_an_empty_batch_has_times_and_no_rows():
    timeline = Timeline((0, 0, 0))
    assert timeline.rows == timeline.batch == 0
    assert timeline.after(torch.empty(0, 2), torch.empty(0, 2)).shape == (0, 2)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("timeline", [RAGGED, EVEN, Timeline((3,)), Timeline((4, 1))], ids=str)
def test_places_are_those_of_each_sequence_in_reading_order(timeline, backwards):
    timeline = Timeline(timeline.sizes, backwards)
    lengths = [sum(size > i for size in timeline.sizes) for i in range(timeline.batch)]
    assert timeline.lengths.tolist() == lengths
    rows = values(timeline)
    padded = timeline.by_place(rows)
    for sequence, length in enumerate(lengths):
        times = list(range(length))[:: -1 if backwards else 1]
        expected = [10 * sequence + time for time in times] + [0] * (len(timeline.sizes) - length)
        assert padded[:, sequence, 0].tolist() == expected
    assert torch.equal(timeline.by_row(padded), rows)


def test_some_of_the_sequences_are_a_timeline_of_their_own():
    chosen = torch.tensor([False, True, False, True])
    timeline, rows = RAGGED.reversed().of(chosen)
    assert timeline == Timeline((2, 1, 1), backwards=True)
    assert values(RAGGED)[rows][:, 0].tolist() == [10, 30, 11, 12]
