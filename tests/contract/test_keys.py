"""Keys: one hash slot a model, names that cannot run into each other, a glossary that is whole."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from headrace.contract import keys

names = st.text(min_size=1, max_size=30)


@given(names, names)
def test_a_models_keys_share_one_hash_tag_and_models_never_share_one(one, two):
    made = [
        keys.lane_stream(one, keys.lane("interactive", "high", "tenant_1")),
        keys.job_hash(one, "job_1"),
        keys.token_log(one, "job_1"),
        keys.subscribers(one, "job_1"),
        keys.counts(one),
        keys.takeovers(one),
        keys.paused(one),
        keys.wake_channel(one),
    ]
    tags = {re.match(r"hr:\{([^{}:]+)\}:", key)[1] for key in made}
    assert tags == {keys.model_tag(one)}
    assert len(set(made)) == len(made)
    assert (keys.prefix(one) == keys.prefix(two)) == (one == two)


def test_the_patterns_are_those_of_the_glossary():
    assert keys.__doc__ is not None
    named = ("lane:<class>:<priority>:<tenant>", "job:<id>", "log:<id>", "subs:<id>", "wake")
    for text in (*named, "counts", "takeovers", "paused"):
        assert f"hr:{{m}}:{text}" in keys.__doc__
    assert keys.lane_stream("m", keys.lane("batch", "low", "t")) == "hr:{m}:lane:batch:low:t"
    assert keys.job_hash("m", "j") == "hr:{m}:job:j"
    assert keys.token_log("m", "j") == "hr:{m}:log:j"
    assert keys.subscribers("m", "j") == "hr:{m}:subs:j"
    assert keys.worker_beat("w") == "hr:worker:w"
    assert keys.worker_last("w") == "hr:worker-last:w"
    assert keys.shard_channel("g") == "hr:shard:g"
    figures = (keys.STREAMS, keys.SAMPLE, keys.SAMPLER, keys.SNAPSHOTS)
    history = (keys.HISTORY_5S, keys.HISTORY_1M)
    for name in (
        *figures,
        *history,
        keys.WORKERS,
        "hr:shard:<gateway>",
        "hr:worker:<id>",
        "hr:worker-last:<id>",
    ):
        assert name in keys.__doc__
