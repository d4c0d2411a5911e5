"""The stock `openai` client against a daemon: python3 openai_client.py BASE_URL MODEL [TOKEN]

Needs `pip install openai`. `.ci/run` starts the daemon and runs this in a virtual environment.
"""

import sys

import openai


def main() -> None:
    base_url, model = sys.argv[1:3]
    token = sys.argv[3] if len(sys.argv) > 3 else "none"
    client = openai.OpenAI(base_url=base_url, api_key=token, timeout=120)
    messages = [
        {"role": "system", "content": "You are a helpful robot."},
        {"role": "user", "content": "Name three colours."},
    ]

    assert model in [entry.id for entry in client.models.list()]
    assert client.models.retrieve(model).id == model

    asked = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    assert text and whole.choices[0].message.role == "assistant", whole
    assert whole.choices[0].finish_reason in ("stop", "length"), whole
    assert whole.usage.completion_tokens <= 24 and whole.usage.prompt_tokens > 10, whole
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    pieces, finish, usage = [], None, None
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
    assert "".join(pieces) == text, (pieces, text)
    assert len([piece for piece in pieces if piece]) > 3, pieces
    assert finish == whole.choices[0].finish_reason
    assert usage.completion_tokens == whole.usage.completion_tokens

    seeded = {**asked, "temperature": 0.9, "seed": 7, "top_p": 0.9, "stop": ["\n"], "logit_bias": {"0": -100}}
    first, second = (client.chat.completions.create(**seeded).choices[0].message.content for _ in range(2))
    assert first == second and "\n" not in first, (first, second)

    completion = client.completions.create(model=model, prompt="The capital of France is", max_tokens=4, temperature=0)
    assert "Paris" in completion.choices[0].text, completion
    texts = [
        chunk.choices[0].text
        for chunk in client.completions.create(
            model=model, prompt="The capital of France is", max_tokens=4, temperature=0, stream=True
        )
    ]
    assert "".join(texts) == completion.choices[0].text, texts

    # Leaving a stream early must not disturb the daemon.
    stream = client.chat.completions.create(**{**asked, "max_tokens": 400}, stream=True)
    next(iter(stream))
    stream.close()

    for wrong, kind in [
        ({"model": "none"}, openai.NotFoundError),
        ({"n": 2}, openai.BadRequestError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, openai.BadRequestError),
    ]:
        try:
            client.chat.completions.create(**{**asked, **wrong})
        except kind as error:
            assert error.body["message"], error.body
        else:
            raise AssertionError(f"{wrong} was not refused")

    if token != "none":
        try:
            openai.OpenAI(base_url=base_url, api_key="wrong").models.list()
        except openai.AuthenticationError:
            pass
        else:
            raise AssertionError("a wrong token was accepted")
    print(f"openai {openai.__version__}: all as expected")


if __name__ == "__main__":
    main()
