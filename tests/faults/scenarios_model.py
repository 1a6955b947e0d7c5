"""The real engine on the CPU under faults: SmolLM2, greedy, so that each prompt has one answer.

First every prompt is answered once by a fleet that nobody hurts; those answers are the references.
Then the same prompts come again and again while workers, engines, Redis and Postgres are killed:
the tokens must be the same ones, although sequences are cut, resumed by prefill of what was logged,
and computed in other batches.

Called by: scenario.all_scenarios.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from headrace.tests.faults.record import Asked, Reference
from headrace.tests.faults.scenario import FaultAction, Rules, Run, Scenario
from headrace.tests.faults.scenarios_workers import kill_both, kill_courier, kill_engine

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a miller who",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "List the planets of the solar system:",
    "A haiku about rivers:",
    "The opposite of cold is",
    "In 1969 the first man",
    "SELECT name FROM",
)
#: Tokens of an answer: enough to be cut in the middle, few enough for a CPU.
NUM_TOKENS = 32


async def kill_redis(run: Run) -> None:
    """Kill Redis and start it again on its append-only file."""
    run.stage.valkey.process.kill()
    run.fault("kill-redis", "valkey")
    await run.stage.on_main(run.stage.restart_valkey)


async def kill_postgres(run: Run) -> None:
    """Kill Postgres's first process; the others end with it."""
    run.stage.postgres.process.kill()
    run.fault("kill-postgres", "postgres")
    await run.stage.on_main(run.stage.restart_postgres)


ACTIONS: tuple[FaultAction, ...] = (
    kill_engine,
    kill_courier,
    kill_redis,
    kill_both,
    kill_postgres,
)


async def model(run: Run) -> None:
    prompts = PROMPTS[: max(3, min(len(PROMPTS), run.num_jobs // 4))]  # a slice needs few
    await make_references(run, prompts)

    async def faults() -> None:
        async for number in run.faults_due():
            await ACTIONS[number % len(ACTIONS)](run)

    def ask(asked: Asked) -> Asked:
        prompt = run.random.choice(prompts)
        return msgspec.structs.replace(
            asked, prompt=prompt, reference=prompt, num_tokens=NUM_TOKENS
        )

    await run.beside(run.load(make=ask), faults())
    await run.until_done()


async def make_references(run: Run, prompts: Sequence[str]) -> None:
    """Answer every prompt once, undisturbed, and write the answers down."""
    for number, prompt in enumerate(prompts):
        key = f"reference-{number}"
        asked = Asked(key, "one", 0, NUM_TOKENS, prompt, reference=prompt)
        job = await run.clients.submit(asked)
        if job is None:
            raise AssertionError(f"the reference of {prompt!r} was refused")
        await run.clients.follow(job, "one")
        output = await run.clients.output(job, "one")
        run.recorder.add(Reference(prompt, output["token_ids"], output["text"]))


SCENARIOS = [
    Scenario(
        name="model",
        what="the CPU engine, greedy: workers and both stores killed, answers as undisturbed",
        jobs=400,
        faults=30,
        slice_jobs=12,
        slice_faults=2,
        run=model,
        rules=Rules(needs_takeovers=True),
        settings={"HEADRACE_KV_CACHE_MB": "256", "HEADRACE_MAX_NUM_SEQS": "8"},
        num_workers=2,
        in_flight=12,
        engine="model",
        slice_limit_s=240.0,
    )
]
