"""Room: two claims never count the same room twice."""

from headrace.worker.room import Room


def opened() -> Room:
    room = Room()
    room.opened(1000, 500, max_num_seqs=4)
    return room


def test_without_an_engine_nothing_fits():
    room = Room()
    assert room.left() == (0, 0)
    assert room.is_idle


def test_a_claimed_job_counts_in_full_until_the_engine_counts_it():
    room = opened()
    room.reserve("a", 300)
    assert room.left() == (700, 3)
    room.admitted("a")
    room.reported(room_tokens=1000, num_admits=0)  # a step that began before it was read
    assert room.left() == (700, 3)
    assert room.reported(room_tokens=850, num_admits=1)  # the engine predicts less than max_tokens
    assert room.left() == (850, 3)


def test_admissions_are_read_in_order():
    room = opened()
    for job in "ab":
        room.reserve(job, 100)
        room.admitted(job)
    room.reported(room_tokens=900, num_admits=1)
    assert room.left()[0] == 800
    assert not room.reported(room_tokens=900, num_admits=1)
    assert room.reported(room_tokens=900, num_admits=2)
    assert room.left()[0] == 900


def test_a_job_that_leaves_frees_its_place():
    room = opened()
    room.reserve("a", 300)
    room.release("a")
    assert room.left() == (1000, 4)
    assert room.is_idle


def test_a_dead_engine_has_no_room():
    room = opened()
    room.reserve("a", 300)
    room.closed()
    assert room.left() == (0, 4)
