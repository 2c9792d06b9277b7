"""An agent that knows nothing of training: it asks a model by OpenAI's client, checks the answer, and asks
again where it is wrong."""

MOST_TRIES = 2


async def sort_letters(client, question):
    """How many tries it took; None where none was right."""
    messages = [{"role": "user", "content": question}]
    letters = question.removeprefix("sort ")
    for tries in range(1, MOST_TRIES + 1):
        reply = await client.chat.completions.create(model="gpt-5", messages=messages)
        answer = reply.choices[0].message.content
        if answer.strip() == "".join(sorted(letters)):
            return tries
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return None
