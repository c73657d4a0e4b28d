"""The official `openai` client, unchanged, against `shoal serve`: prints what it got as JSON."""

import json
import sys

import openai

url, key, prompt, question = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
got = {"models": [model.id for model in client.models.list()]}

chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
whole = client.chat.completions.create(
    model="demo", messages=chat, temperature=0, max_tokens=30, logprobs=True, top_logprobs=2
)
got["chat"] = whole.choices[0].message.content
got["chat_tokens"] = whole.usage.completion_tokens
got["logprobs"] = len(whole.choices[0].logprobs.content)
got["route"] = len(whole.model_extra["x_shoal"]["route"])

stream = client.chat.completions.create(
    model="demo",
    messages=chat,
    temperature=0,
    max_tokens=30,
    stream=True,
    stream_options={"include_usage": True},
)
parts = list(stream)
got["chat_streamed"] = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
got["stream_usage"] = parts[-1].usage.completion_tokens

with client.completions.create(
    model="demo", prompt=prompt, temperature=0, max_tokens=30, stream=True
) as stream:
    got["text"] = "".join(part.choices[0].text for part in stream)

# One that is left in the middle.
with client.completions.create(model="demo", prompt=prompt, max_tokens=900, stream=True) as stream:
    next(iter(stream))

errors = {}
for name, wrong, call in [
    ("model", openai.NotFoundError, {"model": "gpt-9", "prompt": prompt}),
    ("range", openai.BadRequestError, {"model": "demo", "prompt": prompt, "temperature": 9}),
    ("key", openai.AuthenticationError, None),
]:
    try:
        if call is None:
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
        else:
            client.completions.create(**call)
    except wrong as error:
        errors[name] = [error.status_code, error.param, error.code]
got["errors"] = errors
print(json.dumps(got))
