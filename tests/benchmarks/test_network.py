from benchmarks.network import LinkCounts, parse_counters, parse_retransmitted

# As the kernel writes it: 8 numbers received, 8 sent.
TEXT = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier ...
    lo:     900       9    0    0    0     0          0         0      900       9    0    0    0     0       0     0
veth-0:    1000      10    1    2    3     4          5         6       70       7    1    2    3     4       5     6
veth-1:       1       2    0    0    0     0          0         0        3       4    0    0    0     0       0     0
"""


def test_bytes_and_packets_of_both_directions_are_added_up():
    assert parse_counters(TEXT, ["veth-0"]) == LinkCounts(1070, 17)
    assert parse_counters(TEXT, ["veth-0", "veth-1"]) == LinkCounts(1074, 23)
    assert parse_counters(TEXT, []) == LinkCounts(0, 0)


def test_what_crossed_since_is_a_difference():
    assert LinkCounts(1070, 17) - LinkCounts(70, 7) == LinkCounts(1000, 10)


def test_segments_sent_again_are_found_by_their_name():
    text = "Ip: A B\nIp: 1 2\nTcp: RtoMin InSegs RetransSegs InErrs\nTcp: 200 55 7 3\nUdp: X\nUdp: 9\n"
    assert parse_retransmitted(text) == 7
