"""A live coordinator among peers that send whatever they like, for `ASYNCRL_SOAK_S` seconds: something else
each time, or by default for 5 seconds the same."""

import asyncio
import os
import random
import time

import pytest
from live_coordinator import live_coordinator
from wire_attack import Attack

SOAK_S = float(os.environ.get("ASYNCRL_SOAK_S", "5"))
MESSAGES = 50
"""Of each of the two hostile peers in a round."""
WARM_UP_ROUNDS = 20
MAX_GROWTH_BYTES = 48 << 20
MAX_LOG_BYTES_PER_S = 500


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 900)
def test_a_live_coordinator_outlasts_whatever_is_sent_to_it(tmp_path):
    seed = random.SystemRandom().randrange(2**32) if "ASYNCRL_SOAK_S" in os.environ else 0
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def main():
        async with live_coordinator(tmp_path) as live:
            attack = Attack(live)
            started_s = time.monotonic()
            rounds, warm = 0, None
            while time.monotonic() - started_s < SOAK_S or rounds <= WARM_UP_ROUNDS:
                await attack.round(rng, MESSAGES)
                if rounds % 10 == 0:
                    await attack.without_the_keys()
                    await attack.in_another_protocol(rng)
                    await attack.replay_a_connection()
                rounds += 1
                if rounds == WARM_UP_ROUNDS:
                    warm = live.rss_bytes
            grown = live.rss_bytes - warm
            await attack.oversized()
            metrics = await live.step()
            elapsed_s = time.monotonic() - started_s
            print(
                f"{elapsed_s:.0f} s, {rounds} rounds, {attack.messages} messages and "
                f"{metrics['rpc/refused_peers']:.0f} peers refused, {live.version} steps, "
                f"{warm / 2**20:.1f} MiB grew by {grown / 2**20:.1f}, {live.log.stat().st_size} bytes of log"
            )
            assert metrics["rpc/refused"] == attack.messages
            assert metrics["rpc/refused_peers"] >= attack.peers > 0
            assert grown < MAX_GROWTH_BYTES
            assert live.rss_bytes - warm < MAX_GROWTH_BYTES
            text = live.log.read_text()
            assert "refused a message: " in text
            assert "refused a peer: " in text
            assert "Traceback" not in text
            assert len(text) < 10_000 + MAX_LOG_BYTES_PER_S * elapsed_s

    asyncio.run(main())
