"""Rows packed into lines: best fit, longest first. Johnson 1973; at most 11/9 of the fewest lines possible, plus one."""

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Return lines of row numbers whose ``lengths`` (tokens, each at most ``capacity``) sum to at most ``capacity`` a line.

    Each row goes where it leaves the least room. Rows of equal length keep their order, and how many lines there are does not
    depend on it.
    """
    lines: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where some line has room for exactly r tokens more
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            line = with_room[room].pop()
            rooms &= ~(1 << room) if not with_room[room] else -1
        else:
            room, line = capacity, len(lines)
            lines.append([])
        lines[line].append(row)
        with_room[room - length].append(line)
        rooms |= 1 << (room - length)
    return lines
