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


def test_a_sequence_on_its_way_out_keeps_the_worker_from_being_idle():
    room = opened()
    room.reserve("a", 300)
    room.leaves(7)
    room.release("a")
    assert room.left() == (1000, 4), "others may be claimed"
    assert not room.is_idle
    assert not room.gone(8)
    assert room.gone(7)
    assert room.is_idle
    room.leaves(9)
    room.closed()
    assert room.is_idle, "what an engine had is gone with it"


def test_a_trial_lasts_until_the_engine_has_nothing_of_it():
    room = opened()
    assert not room.is_on_trial
    for job in "ab":
        room.reserve(job, 10, is_trial=True)
    room.release("a")
    assert room.is_on_trial
    room.leaves(7)
    room.release("b")
    assert room.is_on_trial
    room.gone(7)
    assert not room.is_on_trial
    room.reserve("c", 10)
    assert not room.is_on_trial
