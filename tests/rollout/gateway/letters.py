"""An environment of `verifiers` as its users write them: tasks, a rubric, and a program of two turns."""

import httpx
import verifiers.v1 as vf
from openai import AsyncOpenAI


class LettersData(vf.TaskData):
    letter: str


class LettersTask(vf.Task[LettersData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def share(self, trace) -> float:
        return trace.last_reply.count(self.data.letter) / max(1, len(trace.last_reply))

    @vf.reward(weight=0.5)
    async def asked_twice(self, trace) -> float:
        return float(trace.num_turns == 2)


class Letters(vf.Taskset[LettersTask]):
    def load(self):
        for letter in "ab":
            data = LettersData(prompt=f"many {letter}", system_prompt="Be brief.", letter=letter)
            yield LettersTask(data, self.config.task)


class AskTwice(vf.Harness[vf.HarnessConfig]):
    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret, timeout=httpx.Timeout(120)) as client:
            for again in ("More.", None):
                reply = await client.chat.completions.create(model=ctx.model, messages=messages, max_tokens=8)
                messages.append({"role": "assistant", "content": reply.choices[0].message.content})
                messages.append({"role": "user", "content": again})
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["AskTwice", "Letters"]
