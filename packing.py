"""Conversations packed whole into samples of one length, for train.py --pack.

    rows = pack_shard(tokens, mask, ends, capacity)     # a pure function of a shard
    tokens_of_row = [tokens[start:stop] for start, stop in rows[0]]

Text may be cut anywhere into samples; a conversation may not, since an answer without its question teaches nothing. So
whole conversations are put together, as many as fit, and what is left of a sample is filled up. One that is too long
loses its oldest turns, but never its system turn. With --reset-at-eos those in one sample do not see each other.
"""

import bisect
from dataclasses import dataclass

import numpy as np


@dataclass
class Rows:
    """Which parts of a shard's tokens make which row."""

    parts: np.ndarray  # [parts, 2]: start and stop of each
    first: np.ndarray  # [rows + 1]: the number of each row's first part, and the number of all
    conversations: int  # in all rows
    cut: int  # of them, those that lost their oldest turns
    left_out: int  # conversations whose last question and answer alone are too long

    @property
    def tokens(self):
        """How many are in all rows, without what fills them up."""
        return int((self.parts[:, 1] - self.parts[:, 0]).sum())

    def __len__(self):
        return len(self.first) - 1

    def __getitem__(self, i):
        return self.parts[self.first[i] : self.first[i + 1]].tolist()


def pack_shard(tokens, mask, ends, capacity, pairs=False):
    """A shard of conversations -> Rows of at most `capacity` tokens, by best fit.

    tokens, mask: [n]; ends: [conversations], where each ends, its end-of-document token included. pairs: each is a pair
    of answers, of which nothing is cut.
    """
    ends = ends.astype(np.int64)
    starts = np.append(0, ends[:-1])[: len(ends)]
    parts = {}  # of conversations that are too long: what is kept of them
    lengths = ends - starts
    for i in np.flatnonzero(lengths > capacity).tolist():
        parts[i] = [] if pairs else newest_turns(tokens, mask, int(starts[i]), int(ends[i]), capacity)
        lengths[i] = sum(stop - start for start, stop in parts[i])
    row_of = best_fit(lengths, capacity)
    order = np.argsort(row_of, kind="stable")
    order = order[row_of[order] >= 0]
    parts_of = [parts.get(i) or [(starts[i], ends[i])] for i in order.tolist()]
    rows = np.repeat(row_of[order], [len(some) for some in parts_of])
    first = np.searchsorted(rows, np.arange(rows.max(initial=-1) + 2))
    left_out = sum(not some for some in parts.values())
    flat = np.array([part for some in parts_of for part in some], dtype=np.int64).reshape(-1, 2)
    return Rows(flat, first, len(order), len(parts) - left_out, left_out)


def newest_turns(tokens, mask, start, end, capacity):
    """The parts of a conversation that are kept: its system turn, and the newest turns that fit; none if none fits.

    What is kept begins with a turn that is no answer. A turn begins with the token that the conversation begins with.
    """
    turns = start + np.flatnonzero(tokens[start:end] == tokens[start])
    system_end = int(turns[1]) if len(turns) > 1 else end
    for turn, stop in zip(turns[1:].tolist(), [*turns[2:].tolist(), end]):
        is_answer = mask[turn:stop].any()
        if not is_answer and system_end - start + end - turn <= capacity:
            return [(start, system_end), (turn, end)] if mask[turn:end].any() else []
    return []


def best_fit(lengths, capacity):
    """The row of each length, [n] int; -1 for a length of 0. Longest first, each into the fullest row with room."""
    row_of = np.full(len(lengths), -1)
    rows_with = [[] for _ in range(capacity + 1)]  # by the room that they have left
    rooms = []  # those that a row has, sorted
    n_rows = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        if not length:
            break
        at = bisect.bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[at]
        else:
            row, room = n_rows, capacity
            n_rows += 1
        row_of[i] = row
        left = room - length
        if left:
            if not rows_with[left]:
                bisect.insort(rooms, left)
            rows_with[left].append(row)
    return row_of
