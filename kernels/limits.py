"""What the kernels can take, for those who must know before they load one: this needs no torch."""

from __future__ import annotations

#: Most tokens whose bias a slot may hold: what the API takes, as OpenAI does.
MAX_BIAS = 300
#: Stop tokens a sequence can have; a model has a few.
MAX_STOPS = 16
